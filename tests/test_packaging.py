"""The installed package: which copy the tests import, what it carries, and what importing it loads."""

import ast
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fastlars
from harness import loop_over

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
    requires = importlib.metadata.requires("fastlars") or []
    assert [requirement for requirement in requires if "extra ==" not in requirement] == ["torch>=2.4"]
    assert [requirement.split(";")[0] for requirement in requires if "extra ==" in requirement] == ["matplotlib>=3.9"]


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = Path(__file__).parents[1].joinpath("CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {fastlars.__version__}\n" in citation


def test_importing_loads_no_optional_part_of_torch() -> None:
    """Beyond the modules that torch itself loads, which differ between versions."""
    code = (
        "import sys, torch; before = {*sys.modules}; import fastlars, fastlars.backends.triton;"
        "sys.stdout.write(' '.join({*sys.modules} - before))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fastlars.backends.triton" in process.stdout
    for package in ("triton", "torch._dynamo", "torch.distributed", "matplotlib"):
        assert not [name for name in process.stdout.split() if f"{name}.".startswith(f"{package}.")]


# modules that Python has on one system only
POSIX_OR_WINDOWS = {"fcntl", "grp", "msvcrt", "posix", "pwd", "resource", "syslog", "termios", "tty", "winreg"}
OF_OS = {"fork", "geteuid", "getuid", "killpg", "mkfifo", "nice", "sched_setaffinity", "uname", "startfile"}
OF_SIGNAL = {"SIGUSR1", "SIGUSR2", "SIGALRM", "SIGHUP", "SIGKILL", "alarm"}


@loop_over("file", sorted(Path(fastlars.__file__).parent.rglob("*.py")))
def test_the_source_holds_to_no_system(file: Path) -> None:
    """macOS and Windows by construction: no module of one system, no path, no platform encoding."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported = {(node.module or "").partition(".")[0]} if node.level == 0 else set()
        else:
            imported = set()
        assert not imported & POSIX_OR_WINDOWS, ast.unparse(node)
        # the package reads and writes no file and starts no process
        assert not imported & {"subprocess", "multiprocessing", "tempfile", "pathlib"}, ast.unparse(node)
        if isinstance(node, ast.Attribute):
            assert node.attr not in OF_OS | OF_SIGNAL, ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "open", ast.unparse(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith(("/tmp", "/dev/", "/proc/", "C:\\")), node.value
