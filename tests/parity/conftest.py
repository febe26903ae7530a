"""Parity with the packages themselves. Only `nox -s parity` runs it, which installs them."""

from importlib.metadata import version

import jax

PACKAGES = ("torch", "timm", "lightly", "optax", "jax", "pytorch-optimizer", "bitsandbytes")

jax.config.update("jax_enable_x64", True)


def pytest_report_header() -> str:
    return "parity with " + ", ".join(f"{name} {version(name)}" for name in PACKAGES)
