"""A user's program type-checks under mypy --strict and pyright against the installed package.

Both are slow on torch, so they run in `nox -s types`, which installs them. The program itself runs everywhere.
"""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fastlars

PACKAGE = str(Path(fastlars.__file__).resolve().parents[1])
PROGRAM = Path(__file__).with_name("user_script.py")
WRONG = """
import torch
import fastlars
from fastlars.schedules import warmup_cosine

model = torch.nn.Linear(2, 2)
groups = fastlars.param_groups(model, 0.1, bias_lr="same")
optimizer = fastlars.LARS(groups, lr=1.0)
fastlars.LARS(groups, lr="1.0")
fastlars.LARS(groups, lr=1.0, momentun=0.9)
fastlars.LARS(groups, lr=1.0, adapt="yes")
fastlars.param_groups(model)
fastlars.param_groups(model, 0.1, exclude_from_adaptation=3)
fastlars.param_groups(model, 0.1, adapt=lambda name: True)
warmup_cosine(optimizer, 1, 10, end_factr=0.1)
fastlars.recipes.simclr(model, batch_size=512, epochs=10, steps_per_epoch=20, momentun=0.5)
ratio: int = optimizer.trust_ratios()
"""
FIRST = WRONG.split("\n").index('fastlars.LARS(groups, lr="1.0")') + 1
WRONG_LINES = set(range(FIRST, WRONG.count("\n") + 1))


def test_the_program_runs() -> None:
    runpy.run_path(str(PROGRAM))


def mypy(program: Path) -> dict[int, str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--show-error-codes", program.name]
    environment = {**os.environ, "PYTHONPATH": PACKAGE}
    output = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=program.parent, env=environment
    ).stdout
    found = [line.split(":", 2) for line in output.splitlines() if ": error: " in line]
    assert found or "Success: no issues found in 1 source file" in output, output
    return {int(line): message for _, line, message in found}


def pyright(program: Path) -> dict[int, str]:
    """basedpyright: pyright with its own Node, so that it downloads nothing when it runs, and with pyright's defaults."""
    settings = {"typeCheckingMode": "standard", "include": [program.name], "extraPaths": [PACKAGE]}
    program.with_name("pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    output = subprocess.run(command, check=False, capture_output=True, text=True, cwd=program.parent).stdout
    report = json.loads(output)
    assert report["summary"]["filesAnalyzed"] == 1, output
    errors = [found for found in report["generalDiagnostics"] if found["severity"] == "error"]
    return {found["range"]["start"]["line"] + 1: found["message"] for found in errors}


@pytest.mark.parametrize("check", [mypy, pyright])
def test_it_type_checks_and_what_is_wrong_does_not(check: Callable[[Path], dict[int, str]], tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="checkers are in group types")
    pytest.importorskip("basedpyright", reason="checkers are in group types")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.read_text(encoding="utf-8"), encoding="utf-8")
    assert check(program) == {}
    program.write_text(WRONG, encoding="utf-8")
    assert check(program).keys() == WRONG_LINES
