"""The benchmarks: models' shapes, contenders that are what their names say, and derived figures. Nothing is timed."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmarks have their own dependencies: group bench")

ROOT = Path(__file__).parents[1]

from benchmarks import first_gpu_run, performance, render
from benchmarks.counting import bytes_moved
from benchmarks.optimizers import ADAPTED, CONTENDERS, LOOP, OURS, YARDSTICK, Contender, groups_of
from benchmarks.results import COPY, READ, Results, Row, load, save
from benchmarks.rounds import FEWEST_ROUNDS, Clock, interleave
from benchmarks.shapes import MODELS

CPU = torch.device("cpu")

# elements and tensors of torchvision's resnet50, vit_b_16 and vit_l_16
PUBLISHED = {
    "resnet50": (25_557_032, 161),
    "vit_b": (86_567_656, 152),
    "vit_l": (304_326_632, 296),
    "small": (1_024_000, 1000),
}
MACHINE = {"device": "cpu", "cpu": "a CPU", "cores": 2, "threads": 2, "load": 0.1, "system": "Linux", "python": "3.11"}
MACHINE |= {"versions": {"torch": "2.13.0"}, "commit": "0", "date": "2026-01-01", "device_name": "a GPU", "cuda": "13"}


def a_run(factor: float = 1.0, device: str = "cpu", case: str = "ResNet-50") -> Results:
    """Made-up milliseconds; every contender moves 20 MB."""
    samples = {YARDSTICK: [1.0, 2.0, 4.0], OURS[0]: [factor, 2 * factor, 4 * factor], LOOP: [3.0, 6.0, 8.0]}
    samples |= {COPY: [2.0, 2.0, 2.0], "lightly": [5.0, 5.0, 5.0]}
    rows = [Row(case, who, 10, 1_000_000, ms, bytes_moved=20_000_000) for who, ms in samples.items()]
    return Results({**MACHINE, "device": device}, {}, rows)


def test_shapes_have_the_published_totals() -> None:
    shapes = {name: model.shapes() for name, model in MODELS.items()}
    assert {name: (sum(map(math.prod, each)), len(each)) for name, each in shapes.items()} == PUBLISHED


def test_bytes_are_those_of_the_design_and_of_the_picture() -> None:
    """One tensor too large to be stacked: 20 bytes per parameter for fused SGD, 28 for ours, 52 for foreach."""
    counted = {}
    for name in (YARDSTICK, "sgd-loop", "fastlars-fused", "fastlars-foreach", "fastlars-single", LOOP):
        param = torch.nn.Parameter(torch.ones(1000, 1000))
        param.grad = torch.ones(1000, 1000)
        optimizer = CONTENDERS[name].make([param])
        optimizer.step()
        counted[name] = round(bytes_moved(optimizer.step) / 1e6)
    ours = {"fastlars-fused": 28, "fastlars-foreach": 52, "fastlars-single": 52}
    assert counted == {YARDSTICK: 20, "sgd-loop": 44, **ours, LOOP: 60}
    picture = (ROOT / "docs" / "bytes.svg").read_text(encoding="utf-8")
    drawn = [int(found) for found in re.findall(r'<tspan font-weight="bold">(\d+)</tspan>', picture)]
    assert drawn == [counted[name] for name in (YARDSTICK, "fastlars-fused", "fastlars-foreach", LOOP)]


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


def test_real_use_adapts_weights_and_not_vectors() -> None:
    shapes = MODELS["resnet50"].shapes()
    with torch.device("meta"):
        params = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
    weights, vectors = groups_of(params, "weights")
    assert [len(group["params"]) for group in (weights, vectors)] == [54, 107]
    assert (weights["adapt"], vectors["adapt"], vectors["weight_decay"]) == (True, False, 0.0)


def test_everyone_makes_one_step_a_round() -> None:
    class Counting(Clock):
        def time(self, step: Any) -> float:
            step()
            return 1.0

    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    assert interleave(steps, Counting(CPU), seconds=60, rounds=4) == {name: [1.0] * 4 for name in "abc"}
    rounds = [tuple(calls[i : i + 3]) for i in range(3, 15, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 1
    assert len(interleave(steps, Counting(CPU), seconds=0)["a"]) == FEWEST_ROUNDS


class Writer(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                assert param.grad.abs().sum() > 0
                param.grad.mul_(0.5)


class Broken(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        raise RuntimeError("no kernel")


def test_a_run_is_stored_and_shown_and_contenders_that_lack_or_fail_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", torch)  # it seems to be installed
    monkeypatch.setitem(CONTENDERS, "timm", Contender("timm", "timm", lambda p: Writer(p, 0.1), "timm"))
    monkeypatch.setitem(CONTENDERS, OURS[2], Contender(OURS[2], "ours", lambda p: Broken(p, 0.1)))
    monkeypatch.setitem(sys.modules, "lightly", None)  # as where it is not installed
    only = [YARDSTICK, *OURS[:3], LOOP, "lightly", "timm"]
    options = ["--models", "resnet50", "--rehearse", "--seconds", "0", "--out", str(tmp_path), "--only", *only]
    assert performance.main(options) == 1, "one failed"
    run = load(tmp_path / "step_time-cpu.json")
    assert run.cases == ["ResNet-50, weights adapted", "ResNet-50"]
    measured = [YARDSTICK, *OURS[:2], LOOP, "timm", COPY, READ]
    assert [row.contender for row in run.rows] == measured * 2
    assert all(len(row.ms) == FEWEST_ROUNDS and min(row.ms) > 0 for row in run.rows)
    assert {row.contender for row in run.rows if row.writes_grad} == {"timm"}
    assert list(run.skipped) == ["lightly", OURS[2]] and str(tmp_path) not in json.dumps(run.machine)
    printed = capsys.readouterr().out
    assert "lightly is not installed" in printed and "RuntimeError: no kernel" in printed
    page = "\n".join(render.section([run], "cpu"))
    assert "lightly was skipped" in page and "| torch SGD(fused=True) and one more read | " in page
    assert r"| timm \* |" in page and "have not been measured" not in page
    assert "| ResNet-50 | " in "\n".join(render.speed(run, []))
    with pytest.raises(SystemExit):
        performance.main(options[:3])  # would replace what the page shows


def test_figures_are_computed_round_by_round(tmp_path: Path) -> None:
    """With one more read in the same rounds: 20 MB by fused SGD, so 8 MB more, at 16 MB in 2, 4 and 2 ms."""
    run = a_run()
    save(run, tmp_path / "run.json")
    assert load(tmp_path / "run.json") == run
    assert run.ratio("ResNet-50", LOOP, YARDSTICK) == 3.0  # of 3, 3 and 2
    row = run.find("ResNet-50", YARDSTICK)
    assert row is not None
    assert (row.bytes_per_parameter, row.gb_s) == (20.0, 10.0)
    assert run.and_a_read("ResNet-50", YARDSTICK) is None  # in results from before
    run.rows.append(Row("ResNet-50", READ, 10, 1_000_000, [2.0, 4.0, 2.0], bytes_moved=16_000_000))
    row = run.and_a_read("ResNet-50", YARDSTICK)
    assert row is not None
    assert (row.ms, row.bytes_moved) == ([2.0, 4.0, 5.0], 28_000_000)
    assert run.relative(row, YARDSTICK) == 2.0  # of 2, 2 and 1.25


def test_the_page_and_readme_say_what_was_measured_where() -> None:
    here, there, gpu = a_run(1.2), a_run(1.7), a_run(1.3, device="cuda")
    first, second = "\n".join(render.section([here, there], "cpu")).split("### Another host")
    assert "| fastlars fused | 20.0 | 2.4 | 8.3 | 1.20 |" in first and "| 1.70 |" in second
    assert "Real param groups have not been measured" in first
    assert "a GPU (CUDA 13)" in "\n".join(render.section([gpu], "cuda"))
    assert "Not measured. `python -m nox -s performance -- --device cuda`" in "\n".join(render.section([], "cuda"))
    text = "\n".join(render.speed(here, [there]))
    assert "| ResNet-50 |  | 1.20 | 2.50 |" in text
    assert "On a host that copies 10 GB/s instead of 10, fastlars took 1.70 on ResNet-50." in text
    real = a_run(1.1, case="ResNet-50" + performance.REAL)
    real.rows += here.rows
    assert "| ResNet-50 |  | 1.10 |" in "\n".join(render.speed(real, [])), "real use is what README shows"


@pytest.mark.slow
def test_pytest_benchmark_times_every_contender_that_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="group bench")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-k", "small and weights and fused"]
    command += [f"--benchmark-json={tmp_path / 'found'}", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    env = {k: v for k, v in os.environ.items() if "XDIST" not in k}  # in its workers benchmarks disable themselves
    subprocess.run(command, check=True, cwd=ROOT, env=env)
    found = json.loads((tmp_path / "found").read_text())["benchmarks"]
    assert {entry["group"] for entry in found} == {"step, cpu, small, weights adapted"}
    assert [entry["params"]["name"] for entry in found] == [YARDSTICK, "fastlars-fused"]


def gpu_run(parts: list[first_gpu_run.Part], out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Any, str]:
    monkeypatch.setattr(first_gpu_run, "parts", lambda _: parts)
    status = first_gpu_run.main(["--device", "cpu", "--out", str(out)])
    return status, json.loads((out / "report.json").read_text())["parts"], (out / "report.txt").read_text()


def test_a_part_that_hangs_or_fails_is_reported_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = "import time, pathlib; time.sleep(4); pathlib.Path('alive').touch()"
    child = (
        f"import os, subprocess, sys; os.chdir({str(tmp_path)!r}); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    commands = {"hangs": f"print('begun')\n{child}", "fails": "raise ValueError('no')", "ends": "print('all is well')"}
    parts = [first_gpu_run.Part(name, 3.0, ["-c", command]) for name, command in commands.items()]
    status, found, text = gpu_run(parts, tmp_path, monkeypatch)
    assert [status, *(part["result"] for part in found)] == [1, "timed out", "failed", "passed"]
    assert all(words in text for words in ("begun", "ValueError: no", "all is well"))
    time.sleep(3)
    assert not (tmp_path / "alive").exists(), "what a part has started ends with it"


@pytest.mark.parametrize("device", ["cuda", "cpu", "vulkan"])
def test_the_first_run_on_a_gpu_fits_its_eight_minutes_and_its_commands_are_right(device: str) -> None:
    parts = first_gpu_run.parts(device)
    assert sum(part.seconds for part in parts) <= 60 * first_gpu_run.MINUTES == 480
    measured = [performance.parse([*part.arguments[2:], "--out", "x"]) for part in parts if part.name != "tests"]
    cases = {(options.device, *options.models, options.dtype, name) for options in measured for name in options.only}
    assert len(cases) == 3 * 2 * 6, "models, dtypes, contenders"


@pytest.mark.slow
def test_the_first_run_on_a_gpu_can_be_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [part for part in first_gpu_run.parts("cpu") if part.name.endswith(": resnet50, bfloat16")]
    few = [replace(part, seconds=300) for part in few]  # of a busy machine
    status, found, _ = gpu_run(few, tmp_path, monkeypatch)
    assert [status, *(len(part["measured"][0]["rows"]) for part in found)] == [0, 7, 4]
