"""What the documentation shows runs: every docstring's examples, and README's Python, read from top to bottom."""

import doctest
import importlib
import pkgutil
import runpy
from pathlib import Path

import pytest
import torch

import fastlars

MODULES = ["fastlars", *(f"fastlars.{module.name}" for module in pkgutil.iter_modules(fastlars.__path__))]
README = Path(__file__).parent.parent / "README.md"


def examples(module: str) -> list[doctest.DocTest]:
    namespace = {"torch": torch, "fastlars": fastlars}
    finder = doctest.DocTestFinder(exclude_empty=True)
    try:
        found = finder.find(importlib.import_module(module), extraglobs=namespace)
    except ModuleNotFoundError as error:  # Triton is not everywhere
        pytest.skip(str(error))
    return [test for test in found if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    runner = doctest.DocTestRunner()
    for test in examples(module):
        runner.run(test)
    assert runner.failures == 0, capsys.readouterr().out


def test_every_public_function_and_class_has_an_example() -> None:
    """A way of looking for them that finds none would pass every one."""
    shown = {
        test.name
        for module in ("functional", "groups", "optimizer", "schedules")
        for test in examples(f"fastlars.{module}")
    }
    assert shown >= {
        "fastlars.functional.lars",
        "fastlars.groups.param_groups",
        "fastlars.optimizer.LARS",
        "fastlars.optimizer.LARS.trust_ratios",
        "fastlars.schedules.warmup_cosine",
        "fastlars.schedules.warmup_polynomial",
    }


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one program: later blocks may use what earlier ones have made. Tracebacks show README's line numbers."""
    program, block = [], False
    for line in README.read_text(encoding="utf-8").splitlines():
        program.append(line if block and line != "```" else "")
        block = line == "```python" or (block and line != "```")
    assert any(program), "README shows no Python"
    monkeypatch.chdir(tmp_path)
    Path("readme.py").write_text("\n".join(program), encoding="utf-8")
    runpy.run_path("readme.py")
