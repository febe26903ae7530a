"""Parity with the packages themselves: run by `nox -s parity`, which installs them, and by nothing else."""

from importlib.metadata import version

import jax

PACKAGES = ("torch", "timm", "lightly", "optax", "jax", "pytorch-optimizer", "bitsandbytes")

jax.config.update("jax_enable_x64", True)


def pytest_report_header() -> str:
    return "parity with " + ", ".join(f"{name} {version(name)}" for name in PACKAGES)
