"""The benchmarks: models' shapes, contenders that are what their names say, and derived figures. Nothing is timed."""

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD

pytest.importorskip("matplotlib", reason="the benchmarks have their own dependencies: group bench")

from benchmarks import first_gpu_run, performance
from benchmarks.counting import bytes_moved
from benchmarks.first_gpu_run import Part
from benchmarks.optimizers import ADAPTED, CONTENDERS, LOOP, YARDSTICK, Contender, groups_of
from benchmarks.results import COPY, READ, Results, Row, load
from benchmarks.rounds import FEWEST_ROUNDS, Clock, interleave
from benchmarks.shapes import MODELS


def test_shapes_have_the_published_totals() -> None:
    """Elements and tensors of torchvision's resnet50, vit_b_16 and vit_l_16."""
    found = {name: (sum(map(math.prod, model.shapes())), len(model.shapes())) for name, model in MODELS.items()}
    published = {"resnet50": (25_557_032, 161), "vit_b": (86_567_656, 152), "vit_l": (304_326_632, 296)}
    assert found == {**published, "small": (1_024_000, 1000)}


def test_bytes_are_those_of_the_design_and_of_the_picture() -> None:
    """One tensor too large to be stacked: 20 bytes per parameter for fused SGD, 28 for ours, 52 for foreach."""
    counted = {}
    for name in (YARDSTICK, "fastlars-fused", "fastlars-foreach", "fastlars-single", LOOP):
        param = torch.nn.Parameter(torch.ones(1000, 1000))
        param.grad = torch.ones(1000, 1000)
        optimizer = CONTENDERS[name].make([param])
        optimizer.step()
        counted[name] = round(bytes_moved(optimizer.step) / 1e6)
    assert list(counted.values()) == [20, 28, 52, 52, 60]
    picture = (first_gpu_run.ROOT / "docs" / "bytes.svg").read_text(encoding="utf-8")
    assert re.findall(r'<tspan font-weight="bold">(\d+)</tspan>', picture) == ["20", "28", "52", "60"]


@pytest.mark.parametrize("adapted", ADAPTED)
def test_the_loop_is_the_lars_that_it_stands_for(adapted: str) -> None:
    stepped = {}
    for name in (LOOP, "fastlars-single"):
        params = [torch.nn.Parameter(torch.linspace(0.1, 1, 6).view(2, 3)), torch.nn.Parameter(torch.ones(3))]
        for param in params:
            param.grad = torch.full_like(param, 0.5)
        optimizer = CONTENDERS[name].make(groups_of(params, adapted))
        for group in optimizer.param_groups:
            group["lr"] = 10.0
        for _ in range(3):
            optimizer.step()
        stepped[name] = params
    torch.testing.assert_close(stepped[LOOP], stepped["fastlars-single"])
    assert (stepped[LOOP][1] < -10).all() == (adapted == "weights"), "vectors take lr as it is, unless all are adapted"


def test_everyone_makes_one_step_a_round() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    found = interleave(steps, Clock(torch.device("cpu")), seconds=60, rounds=9)
    assert {name: len(ms) for name, ms in found.items()} == dict.fromkeys("abc", 9)
    rounds = [tuple(calls[i : i + 3]) for i in range(3, 30, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 1


def test_contenders_that_lack_or_fail_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(CONTENDERS, "fastlars-single", Contender("fastlars-single", "", partial(SGD, lr=-1)))
    monkeypatch.setitem(sys.modules, "lightly", None)  # as where it is not installed
    options = ["--models", "resnet50", "--rehearse", "--seconds", "0", "--out", str(tmp_path)]
    assert performance.main([*options, "--only", YARDSTICK, "fastlars-fused", "fastlars-single", "lightly"]) == 1
    run = load(tmp_path / "step_time-cpu.json")
    assert run.cases == ["ResNet-50, weights adapted", "ResNet-50"]
    assert [row.contender for row in run.rows] == [YARDSTICK, "fastlars-fused", COPY, READ] * 2
    assert all(len(row.ms) == FEWEST_ROUNDS and min(row.ms) > 0 for row in run.rows)
    assert list(run.skipped) == ["lightly", "fastlars-single"]
    printed = capsys.readouterr().out
    assert "lightly is not installed" in printed and "ValueError: Invalid learning rate" in printed
    with pytest.raises(SystemExit):
        performance.main(options[:3])  # would replace what the page shows


def test_figures_are_computed_round_by_round() -> None:
    """With one more read in the same rounds: 20 MB by fused SGD, so 8 MB more, at 16 MB in 2, 4 and 2 ms."""
    measured = [(YARDSTICK, 20, [1.0, 2.0, 4.0]), (LOOP, 60, [3.0, 6.0, 8.0]), (READ, 16, [2.0, 4.0, 2.0])]
    run = Results({}, {}, [Row("case", who, 10, 10**6, ms, bytes_moved=mb * 10**6) for who, mb, ms in measured])
    assert run.ratio("case", LOOP, YARDSTICK) == 3.0  # of 3, 3 and 2
    row = run.and_a_read("case", YARDSTICK)
    assert (row.ms, row.bytes_per_parameter, row.gb_s) == ([2.0, 4.0, 5.0], 28.0, 7.0)


@pytest.mark.slow
def test_pytest_benchmark_times_every_contender_that_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="group bench")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-k", "small and weights and fused"]
    command += [f"--benchmark-json={tmp_path / 'found'}", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    env = {k: v for k, v in os.environ.items() if "XDIST" not in k}  # in its workers benchmarks disable themselves
    subprocess.run(command, check=True, cwd=first_gpu_run.ROOT, env=env)
    found = json.loads((tmp_path / "found").read_text())["benchmarks"]
    assert [entry["params"]["name"] for entry in found] == [YARDSTICK, "fastlars-fused"]


def test_the_first_run_on_a_gpu_fits_its_eight_minutes_and_its_commands_are_right() -> None:
    parts = first_gpu_run.parts("cuda")
    assert sum(part.seconds for part in parts) <= 60 * first_gpu_run.MINUTES == 480
    for command in (part.arguments for part in parts if part.name != "tests"):
        performance.parse([*command[2:], "--out", "x"])  # it would exit


@pytest.mark.slow
def test_the_first_run_on_a_gpu_outlives_parts_that_hang_or_fail(tmp_path: Path, monkeypatch: Any) -> None:
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path)!r}, 'alive').touch()"
    hangs = f"import subprocess, sys; print('begun'); subprocess.run([sys.executable, '-c', {child!r}])"
    parts = [Part("hangs", 3, ["-c", hangs]), Part("fails", 3, ["-c", "raise ValueError('no')"])]
    cases = [part for part in first_gpu_run.parts("cpu") if part.name.endswith(": resnet50, bfloat16")]
    parts += [Part(part.name, 300, part.arguments) for part in cases]
    monkeypatch.setattr(first_gpu_run, "parts", lambda _: parts)
    assert first_gpu_run.main(["--device", "cpu", "--out", str(tmp_path)]) == 1, "not all passed"
    found, text = json.loads((tmp_path / "report.json").read_text())["parts"], (tmp_path / "report.txt").read_text()
    assert [part["result"] for part in found] == ["timed out", "failed", "passed", "passed"]
    assert [len(part["measured"][0]["rows"]) for part in found[2:]] == [7, 4]
    assert "begun" in text and "ValueError: no" in text
    assert not (tmp_path / "alive").exists(), "what a part has started ends with it"
