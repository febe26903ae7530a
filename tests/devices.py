"""The devices besides the CPU that this machine has, and the marks that select their tests.

torchvulkan and torch_xla are separate packages. They are imported only if installed, as in the environments of their nox
sessions.
"""

import importlib.util
import os

import pytest
import torch

EXPECTED = os.environ.get(
    "FASTLARS_EXPECT_DEVICE", ""
)  # set by the nox session of a device, so that a missing device fails


def _present() -> dict[str, torch.device]:
    found = {}
    if torch.cuda.is_available():
        found["cuda"] = torch.device("cuda")
    if torch.backends.mps.is_available():
        found["mps"] = torch.device("mps")
    if importlib.util.find_spec("torchvulkan"):
        import torchvulkan  # noqa: PLC0415  registers the device

        if torchvulkan.is_available():
            found["vulkan"] = torch.device("vulkan")
    if importlib.util.find_spec("torch_xla"):
        import torch_xla  # noqa: PLC0415

        found["xla"] = torch_xla.device()
    if EXPECTED and EXPECTED not in found:
        raise RuntimeError(f"this session is for {EXPECTED}, and torch finds {sorted(found) or 'the CPU alone'}")
    return found


DEVICES = _present()


def settle() -> None:
    """Run what XLA has recorded so far as one graph. Otherwise each value that is read is compiled as a graph of its own."""
    if "xla" in DEVICES:
        import torch_xla  # noqa: PLC0415

        torch_xla.sync()


def needs(name: str) -> pytest.MarkDecorator:
    """Mark a test for a device, and skip it if the device is missing."""
    return pytest.mark.skipif(name not in DEVICES, reason=f"this machine has no {name} device")
