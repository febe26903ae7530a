"""The benchmarks: models' shapes, contenders that are what their names say, and derived figures. Nothing is timed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks have their own dependencies: group bench")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks/ is not part of the package and is run from the repository root

from benchmarks import long_run, performance, render
from benchmarks.counting import bytes_moved
from benchmarks.optimizers import ADAPTED, CONTENDERS, LOOP, OURS, YARDSTICK, Contender, groups_of
from benchmarks.rounds import COPY, FEWEST_ROUNDS, READ, Clock, Results, Row, interleave, load, save
from benchmarks.shapes import MODELS

CPU = torch.device("cpu")

# elements and tensors of torchvision's resnet50, vit_b_16, vit_l_16 and convnext_tiny, and of transformers' BertModel
PUBLISHED = {
    "resnet50": (25_557_032, 161),
    "vit_b": (86_567_656, 152),
    "vit_l": (304_326_632, 296),
    "bert_base": (109_482_240, 199),
    "convnext_t": (28_589_128, 182),
    "small": (1_024_000, 1000),
}
MACHINE = {"device": "cpu", "cpu": "a CPU", "cores": 2, "threads": 2, "load": 0.1, "system": "Linux", "python": "3.11"}
MACHINE |= {"versions": {"torch": "2.13.0"}, "commit": "0", "date": "2026-01-01", "device_name": "a GPU", "cuda": "13"}


def a_run(factor: float = 1.0, device: str = "cpu", case: str = "ResNet-50") -> Results:
    """Made-up milliseconds; every contender moves 20 MB."""
    samples = {YARDSTICK: [1.0, 2.0, 4.0], OURS[0]: [factor, 2 * factor, 4 * factor], LOOP: [3.0, 6.0, 8.0]}
    samples |= {COPY: [2.0, 2.0, 2.0], "lightly": [5.0, 5.0, 5.0]}
    rows = [Row(case, who, 10, 1_000_000, ms, bytes_moved=20_000_000) for who, ms in samples.items()]
    return Results("step_time", {**MACHINE, "device": device}, {}, rows)


def test_shapes_have_the_published_totals() -> None:
    assert {name: (model.elements, model.tensors) for name, model in MODELS.items()} == PUBLISHED


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
    assert interleave(steps, Counting(CPU), rounds=4, seconds=60) == {name: [1.0] * 4 for name in "abc"}
    rounds = [tuple(calls[i : i + 3]) for i in range(3, 15, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 1
    assert len(interleave(steps, Counting(CPU), rounds=50, seconds=0)["a"]) == FEWEST_ROUNDS


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small model, and yardsticks that fit in a cache."""
    model = type(MODELS["small"])("ResNet-50", lambda: [(3, 4), (4,)])
    monkeypatch.setattr("benchmarks.performance.MODELS", {"resnet50": model})
    monkeypatch.setattr("benchmarks.rounds.COPY_ELEMENTS", 64)


class Writer(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                assert param.grad.abs().sum() > 0
                param.grad.mul_(0.5)


@pytest.mark.usefixtures("tiny")
def test_a_run_is_stored_and_shown_and_peers_that_lack_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CONTENDERS, "timm", Contender("timm", "timm", lambda p: Writer(p, 0.1), "timm"))
    peer = CONTENDERS["lightly"].make
    monkeypatch.setitem(CONTENDERS, "lightly", Contender("lightly", "lightly", peer, "no_such"))
    monkeypatch.setitem(sys.modules, "lightly", None)  # as if it were not installed
    only = [YARDSTICK, *OURS[:2], LOOP, "lightly", "timm"]
    assert performance.main(["--models", "resnet50", "--rounds", "2", "--out", str(tmp_path), "--only", *only]) == 0
    run = load(tmp_path / "step_time-cpu.json")
    assert run.cases == ["ResNet-50, weights adapted", "ResNet-50"]
    measured = [YARDSTICK, *OURS[:2], LOOP, "timm", COPY, READ]
    assert [row.contender for row in run.rows] == measured * 2
    assert all(len(row.ms) == 2 and min(row.ms) > 0 for row in run.rows)
    assert {row.contender for row in run.rows if row.writes_grad} == {"timm"}
    assert list(run.skipped) == ["lightly"] and str(tmp_path) not in json.dumps(run.machine)
    assert "skipped: " in capsys.readouterr().out
    page = "\n".join(render.section([run], [], "cpu"))
    assert "lightly was skipped" in page and "| torch SGD(fused=True) and one more read | " in page
    assert r"| timm \* |" in page and "have not been measured" not in page
    assert "| ResNet-50 | " in "\n".join(render.speed([run], []))


def test_figures_are_computed_round_by_round(tmp_path: Path) -> None:
    """With one more read in the same rounds: 20 MB by fused SGD, so 8 MB more, at 16 MB in 2, 4 and 2 ms."""
    run = a_run()
    save(run, tmp_path / "run.json")
    assert load(tmp_path / "run.json") == run
    assert run.ratio("ResNet-50", LOOP, YARDSTICK) == 3.0  # of 3, 3 and 2
    row = run.find("ResNet-50", YARDSTICK)
    assert row is not None
    assert (row.bytes_per_parameter, row.gb_s, run.share_of_copy(row)) == (20.0, 10.0, 1.0)
    assert run.and_a_read("ResNet-50", YARDSTICK) is None  # in older results
    run.rows.append(Row("ResNet-50", READ, 10, 1_000_000, [2.0, 4.0, 2.0], bytes_moved=16_000_000))
    row = run.and_a_read("ResNet-50", YARDSTICK)
    assert row is not None
    assert (row.ms, row.bytes_moved) == ([2.0, 4.0, 5.0], 28_000_000)
    assert run.relative(row, YARDSTICK) == 2.0  # of 2, 2 and 1.25


def test_the_page_and_readme_say_what_was_measured_where() -> None:
    here, there, gpu = a_run(1.2), a_run(1.7), a_run(1.3, device="cuda")
    page = "\n".join(render.section([here, gpu], [there], "cpu"))
    assert "| ResNet-50 | torch SGD(fused=True) | kept | 1.40 | 1.20 |" in page.split("### Another host")[0]
    assert "| ResNet-50 | torch SGD(fused=True) | not kept | 1.40 | 1.70 |" in page.split("### Another host")[1]
    assert "Real param groups have not been measured" in page
    assert "a GPU (CUDA 13)" in "\n".join(render.section([here, gpu], [there], "cuda"))
    assert "Not measured. `python -m nox -s performance -- --device cuda`" in "\n".join(render.section([], [], "cuda"))
    text = "\n".join(render.speed([here], [there]))
    assert "| ResNet-50 |  | 1.20 | 2.50 |" in text
    assert "On a host that copies 10 GB/s instead of 10, fastlars took 1.70 on ResNet-50." in text
    real = a_run(1.1, case="ResNet-50" + performance.REAL)
    real.rows += here.rows
    assert "| ResNet-50 |  | 1.10 |" in "\n".join(render.speed([real], [])), "real use is what README shows"


@pytest.mark.slow
def test_pytest_benchmark_times_and_compares(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="group bench")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-k", "small and weights and (fused or timm)"]
    command += [f"--benchmark-storage={tmp_path}", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    subprocess.run([*command, "--benchmark-save=one"], check=True, cwd=ROOT)
    (stored,) = tmp_path.rglob("*one.json")
    assert {entry["group"] for entry in json.loads(stored.read_text())["benchmarks"]} == {
        "step, small, weights adapted"
    }
    stored.write_text(re.sub(r'"median": [\d.e-]+', '"median": 1e-9', stored.read_text()))
    slower = subprocess.run(
        [*command, "--benchmark-compare", "--benchmark-compare-fail=median:10%"], check=False, cwd=ROOT
    )
    assert slower.returncode != 0


@pytest.mark.parametrize(
    ("late", "fault"),
    [
        ({}, None),
        ({"resident_mib": 109.0}, "memory grew by 9.0 MiB"),
        ({"foreach_drift": 2e-5}, "foreach drifted by 2.0e-05"),
        ({"single_us": 140.0}, "single became slower, 1.40 times"),
        # a machine that has become slower
        ({"single_us": 140.0, "foreach_us": 140.0, "fused_us": 140.0, "torch SGD_us": 70.0}, None),
    ],
)
def test_a_long_run_fails_where_a_bound_breaks(late: dict[str, float], fault: str | None) -> None:
    block: dict[str, Any] = {"step": 1000, "loss": 1.0, "resident_mib": 100.0, "objects": 1000, "torch SGD_us": 50.0}
    for name in long_run.IMPLEMENTATIONS:
        block |= {f"{name}_us": 100.0, f"{name}_drift": 1e-7}
    text, faults = long_run.summary([block] * 18 + [block | late] * 2, MACHINE)
    assert [fault in each for each in faults] == ([] if fault is None else [True])
    assert text.count("\n| ") == 1 + 1 + len(long_run.IMPLEMENTATIONS) + 1
