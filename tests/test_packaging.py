"""The installed package: which copy the tests import, what it carries, and what importing it loads."""

import functools
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fastlars

of_the_wheel = pytest.mark.skipif(
    os.environ.get("FASTLARS_EXPECT_WHEEL") != "1", reason="fastlars need not be the built wheel outside nox"
)


@of_the_wheel
def test_the_tests_import_the_wheel_not_the_checkout() -> None:
    folder = Path(fastlars.__file__).resolve().parent
    assert folder.parent == Path(sysconfig.get_path("purelib")).resolve()


@of_the_wheel
def test_the_wheel_is_typed() -> None:
    assert Path(fastlars.__file__).with_name("py.typed").is_file()


@of_the_wheel
def test_the_metadata_has_the_version_of_the_package() -> None:
    assert importlib.metadata.version("fastlars") == fastlars.__version__


@of_the_wheel
def test_torch_is_the_only_requirement() -> None:
    assert importlib.metadata.requires("fastlars") == ["torch>=2.4"]


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = Path(__file__).parents[1].joinpath("CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {fastlars.__version__}\n" in citation


@pytest.mark.parametrize("package", ["triton", "torch._dynamo", "torch.distributed"])
def test_importing_loads_no_optional_part_of_torch(package: str) -> None:
    """Beyond what torch itself loads, which differs between versions."""
    of_package = {name for name in loaded("torch, fastlars") if name == package or name.startswith(package + ".")}
    assert of_package <= loaded("torch")


@functools.cache
def loaded(imports: str) -> set[str]:
    code = f"import sys, {imports}; sys.stdout.write(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
