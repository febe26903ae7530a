"""The benchmarks: shapes are the models', a run leaves what it should, and what is computed from it is right. Nothing is timed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for module in ("rich", "matplotlib"):
    pytest.importorskip(module, reason="the benchmarks have their own dependencies: group bench")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks/ is no part of the package; it is run from the repository root

import ranks
from benchmarks import (
    compare,
    compile_time,
    distributed,
    figure,
    long_run,
    models,
    passes,
    readme,
    render,
    step_time,
    tables,
    training_step,
)
from benchmarks.counting import bytes_moved, peak_extra_bytes
from benchmarks.measuring import measure
from benchmarks.optimizers import CONTENDERS, LOOP, OURS, YARDSTICK, Contender
from benchmarks.results import COPY, ELSEWHERE, READ, Results, Row, load, save
from benchmarks.shapes import MODELS, TINY
from benchmarks.timing import FEWEST_ROUNDS, CPUClock, Length, interleave

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


def results(benchmark: str, samples: dict[tuple[str, str], list[float]], **machine: Any) -> Results:
    """A run by hand: milliseconds by case and contender."""
    known = {
        "device": "cpu",
        "device_name": "a CPU",
        "cpu": "a CPU",
        "cores": 2,
        "threads": 2,
        "load": 0.1,
        "system": "Linux",
        "python": "3.11",
        "versions": {"torch": "2.13.0"},
        "commit": "0",
        "date": "2026-01-01",
    }
    rows = [Row(case, who, 10, 1_000_000, ms, bytes_moved=20_000_000) for (case, who), ms in samples.items()]
    return Results(benchmark, {**known, **machine}, {"dtype": "float32"}, rows)


def a_run(factor: float = 1.0, **machine: Any) -> Results:
    samples = {("ResNet-50", YARDSTICK): [1.0, 2.0, 4.0], ("ResNet-50", OURS[0]): [factor, 2 * factor, 4 * factor]}
    samples |= {("ResNet-50", LOOP): [3.0, 6.0, 8.0], ("ResNet-50", COPY): [2.0, 2.0, 2.0]}
    return results("step_time", samples, **machine)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_totals(name: str) -> None:
    assert (MODELS[name].elements, MODELS[name].tensors) == PUBLISHED[name]
    assert PUBLISHED.keys() == MODELS.keys()


@pytest.mark.parametrize("name", ["resnet50", "vit_b"])
def test_the_trained_models_have_these_shapes(name: str) -> None:
    with torch.device("meta"):
        model = {"resnet50": models.resnet50, "vit_b": models.ViT}[name]()
        size = 64 if name == "resnet50" else 224
        assert model(torch.empty(2, 3, size, size)).shape == (2, 1000)
    assert sorted(tuple(p.shape) for p in model.parameters()) == sorted(MODELS[name].shapes())


def test_bytes_and_memory_are_those_of_the_design() -> None:
    """One tensor past any stacking: 20 bytes a parameter for fused SGD, 28 for ours, 52 and no temporary for foreach."""
    counted, held = {}, {}
    for name in (YARDSTICK, "sgd-loop", *OURS, LOOP):
        param = torch.nn.Parameter(torch.ones(1000, 1000))
        param.grad = torch.ones(1000, 1000)
        optimizer = CONTENDERS[name].make([param])
        optimizer.step()
        counted[name] = round(bytes_moved(optimizer.step) / 1e6, 1)
        held[name] = round(peak_extra_bytes(optimizer.step, CPU) / 1e6, 1)
    expected = {
        YARDSTICK: 20,
        "sgd-loop": 44,
        "fastlars-fused": 28,
        "fastlars-foreach": 52,
        "fastlars-single": 52,
        LOOP: 60,
    }
    assert counted == expected
    # the picture of docs/bytes.md
    assert [row.bytes for row in passes.ROWS] == [counted[name] for name in (YARDSTICK, *OURS[:2], LOOP)]
    assert passes.PICTURE.read_text(encoding="utf-8") == passes.draw(), "run python -m benchmarks.passes"
    # ours: the workspace of small tensors, which is there when a step begins
    assert held == {**dict.fromkeys(expected, 0), "fastlars-fused": 2.1, "sgd-loop": 4, LOOP: 4}


def test_the_loop_is_the_lars_that_it_stands_for() -> None:
    stepped = {}
    for name in (LOOP, "fastlars-single"):
        params = [torch.nn.Parameter(torch.linspace(0.1, 1, 6).view(2, 3)), torch.nn.Parameter(torch.zeros(3))]
        for param in params:
            param.grad = torch.full_like(param, 0.5)
        optimizer = CONTENDERS[name].make(params)
        optimizer.param_groups[0]["lr"] = 10.0
        for _ in range(3):
            optimizer.step()
        stepped[name] = params
    torch.testing.assert_close(stepped[LOOP], stepped["fastlars-single"])


def test_everyone_makes_one_step_a_round() -> None:
    class Counting:
        device = CPU

        def time(self, step: Any) -> float:
            step()
            return 1.0

    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = interleave(steps, Counting(), Length(rounds=4, seconds=60))
    assert samples == {name: [1.0] * 4 for name in "abc"}
    rounds = [tuple(calls[i : i + 3]) for i in range(3, 15, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 1

    samples = interleave(steps, Counting(), Length(rounds=50, seconds=0))
    assert len(samples["a"]) == FEWEST_ROUNDS


def test_who_writes_gradients_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer(torch.optim.SGD):
        def step(self) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.grad.mul_(0.5)

    seen: list[Any] = []

    class Reader(torch.optim.SGD):
        def step(self) -> None:  # type: ignore[override]
            seen.append(self.param_groups[0]["params"][0].grad.clone())

    both = {
        cls.__name__: Contender(cls.__name__, "", lambda params, c=cls: c(params, 0.1), "p") for cls in (Writer, Reader)
    }
    monkeypatch.setattr("benchmarks.measuring.CONTENDERS", both)

    class SmallCopy:
        bytes_moved = bytes_read = 0

        def __call__(self) -> None:
            pass

        read = __call__

    rows = measure("case", [(8,)], list(both), CPUClock(), SmallCopy(), Length(2, 1), torch.float32)  # type: ignore[arg-type]
    assert [row.writes_grad for row in rows] == [True, False, False, False]
    of_measure = [grad for grad in seen if grad.shape == (8,)]
    assert len(of_measure) > 4 and all(torch.equal(grad, of_measure[0]) for grad in of_measure)


def test_a_run_writes_what_load_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    arguments = ["--models", TINY.name, "--rounds", "2", "--out", str(path), "--only", YARDSTICK, *OURS, LOOP]
    assert step_time.main(arguments) == 0
    run = load(path)
    assert [row.contender for row in run.rows] == [YARDSTICK, *OURS, LOOP, COPY, READ]
    assert all(len(row.ms) == 2 and min(row.ms) > 0 for row in run.rows)
    assert {(row.tensors, row.elements) for row in run.rows} == {(TINY.tensors, TINY.elements)}
    assert run.machine["versions"]["torch"] and str(tmp_path) not in path.read_text()
    printed = capsys.readouterr().out
    assert re.search(r"copy \d+\.\d GB/s, read \d+\.\d GB/s, 2 rounds", printed)
    assert re.search(r"torch SGD\(fused=True\) and one more read +28\.0", printed)
    assert printed.index("bytes/param") < printed.index("ms") and "\x1b" not in printed and "…" not in printed


def test_a_training_run_has_first_steps(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert training_step.main(["--models", "tiny", "--rounds", "2", "--out", str(path)]) == 0
    assert all(row.first_step_ms is not None and len(row.ms) == 2 for row in load(path).rows)


def test_a_peer_that_is_not_installed_is_skipped_by_name() -> None:
    assert (
        Contender("x", "x", CONTENDERS[LOOP].make, package="no-such-package").missing()
        == "no-such-package is not installed"
    )

    def broken(_params: Any) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    assert "nms does not exist" in Contender("x", "x", broken, package="torch").missing()
    assert CONTENDERS[LOOP].missing() == ""


def test_figures_are_computed_round_by_round(tmp_path: Path) -> None:
    run = a_run()
    save(run, tmp_path / "run.json")
    assert load(tmp_path / "run.json") == run
    assert run.ratio("ResNet-50", LOOP, YARDSTICK) == 3.0  # of 3, 3, 2; the medians' ratio is 3 too
    row, copy = run.find("ResNet-50", YARDSTICK), run.find("ResNet-50", COPY)
    assert row is not None and copy is not None
    assert (row.bytes_per_parameter, row.gb_s, run.share_of_copy(row)) == (20.0, 10.0, 1.0)


def test_what_one_more_read_takes_is_measured_in_the_same_rounds(tmp_path: Path) -> None:
    """20 MB by fused SGD, so 8 MB are read once more: at 16 MB in 2, 4 and 2 ms."""
    run = a_run()
    assert run.and_a_read("ResNet-50", YARDSTICK) is None  # in results from before
    assert [row.contender for row in tables.rows_of(run, "ResNet-50")] == [YARDSTICK, OURS[0], LOOP]
    run.rows.append(Row("ResNet-50", READ, 10, 1_000_000, [2.0, 4.0, 2.0], bytes_moved=16_000_000))
    row = run.and_a_read("ResNet-50", YARDSTICK)
    assert row is not None
    assert (row.ms, row.bytes_moved) == ([2.0, 4.0, 5.0], 28_000_000)
    assert run.relative(row, YARDSTICK) == 2.0  # of 2, 2, 1.25
    assert run.and_a_read("ResNet-50", "no-such") is None
    rows = [row.contender for row in tables.rows_of(run, "ResNet-50")]
    assert rows == [YARDSTICK, f"{tables.title(YARDSTICK)} and one more read", OURS[0], LOOP]
    figure.draw(run, None, tmp_path / "with.svg")
    assert "one more read" in (tmp_path / "with.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("factor", "margin", "status"), [(1.0, "10", 0), (1.09, "10", 0), (1.11, "10", 1), (1.11, "12", 0), (0.5, "10", 0)]
)
def test_compare_exits_1_on_a_regression(tmp_path: Path, factor: float, margin: str, status: int) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    save(a_run(), before)
    save(a_run(factor), after)
    assert compare.main([str(before), str(after), "--margin", margin]) == status


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (results("scaling", {}), "one benchmark"),
        (a_run(threads=8), "same threads"),
        (results("step_time", {("ViT-B/16", YARDSTICK): [1.0]}), "no case in common"),
        (None, "must be a result"),
    ],
    ids=["benchmark", "threads", "cases", "no file"],
)
def test_compare_refuses_what_does_not_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: Results | None, reason: str
) -> None:
    save(a_run(), tmp_path / "before.json")
    if other is not None:
        save(other, tmp_path / "after.json")
    assert compare.main([str(tmp_path / "before.json"), str(tmp_path / "after.json")]) == 2
    assert reason in capsys.readouterr().err


def test_cold_compilation_is_counted_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    case = next(iter(compile_time.CASES))
    assert compile_time.main(["--rounds", "1", "--cases", case, "--out", str(tmp_path / "run.json")]) == 0
    rows = load(tmp_path / "run.json").rows
    assert [row.contender for row in rows] == list(compile_time.FUSED)
    assert all(0 < row.ms[0] < 3e5 for row in rows)
    page = "\n".join(render._compile_table(load(tmp_path / "run.json")))
    assert f"| {case} |" in page and " 1.00 |" in page


def test_the_page_has_the_figures_of_the_results(tmp_path: Path) -> None:
    save(a_run(1.2), tmp_path / "results" / "step_time-cpu.json")
    samples = {
        (f"{series}: {i}", who): [1.0]
        for series in ("tensors", "elements")
        for i in (1, 2)
        for who in (YARDSTICK, COPY)
    }
    save(results("scaling", samples), tmp_path / "results" / "scaling-cpu.json")
    for _ in range(2):
        assert render.main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]) == 0
        picture = (tmp_path / "docs" / "performance-cpu.svg").read_bytes()
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert "| ResNet-50 | torch SGD(fused=True) | at most 1.40 times its time (aim 1.28) | 1.20 | kept |" in page
    assert "| ViT-B/16 | quadra loop | at least 2.0 times as fast |  | not measured |" in page
    assert "![Step time" in page and "fastlars fused 1.20 on ResNet-50" in page
    assert "Not measured. `python -m nox -s bench -- --device cuda` measures it." in page
    assert render.main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]) == 0
    assert (tmp_path / "docs" / "performance-cpu.svg").read_bytes() == picture, "the same results make the same file"


def test_the_page_says_what_other_hosts_measured(tmp_path: Path) -> None:
    save(a_run(1.2), tmp_path / "results" / "step_time-cpu.json")
    save(a_run(1.7), tmp_path / "results" / ELSEWHERE / "slow.json")
    assert render.main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]) == 0
    page = (tmp_path / "docs" / "performance.md").read_text()
    here, there = page[: page.index("## GPU")].split("### On other hosts")
    assert "| 1.20 | kept |" in here and "1.70" not in here
    assert "| 1.70 | not kept |" in there and "1.20" not in there
    assert "On other hosts" not in page[page.index("## GPU") :]
    text = "\n".join(readme.speed([a_run(1.2)], [a_run(1.7)]))
    assert "On another host, which copies 10 GB/s instead of 10, it took 1.70 on ResNet-50." in text


def test_the_page_says_what_a_run_on_a_gpu_kept(tmp_path: Path) -> None:
    run = a_run(1.5, device="cuda", device_name="a GPU", cuda="13.0")
    ours = run.find("ResNet-50", OURS[0])
    assert ours is not None
    ours.host_us = 249.6
    save(run, tmp_path / "results" / "step_time-cuda.json")
    assert render.main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]) == 0
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert "| ResNet-50 | torch SGD(fused=True) | at most 1.40 times its time (aim 1.25) | 1.50 | not kept |" in page
    assert "| ResNet-50 | copy | at least 0.85 of its bandwidth | 0.67 | not kept |" in page  # medians of 3 and 2 ms
    assert "| ResNet-50 | host | at most 250 us for a step | 250 | kept |" in page
    assert "| ViT-L/16 | copy | at least 0.85 of its bandwidth |  | not measured |" in page
    assert "| fastlars fused | 20.0 | 3 | 6.7 | 67 % | 1.50 | 250 |" in page


def test_the_step_against_ranks_is_one_exchange_of_eight_bytes_a_tensor(tmp_path: Path) -> None:
    if not ranks.FULLY_SHARDS_ON_CPU:
        pytest.skip("fully_shard works on CPU from torch 2.9 on")
    path = tmp_path / "results" / "distributed-cpu.json"
    assert distributed.main(["--model", "tiny", "--ranks", "1", "2", "--rounds", "5", "--out", str(path)]) == 0
    found = load(path)
    assert [(row.case, row.contender, len(row.ms), row.bytes_moved) for row in found.rows] == [
        ("tiny on 1 rank", distributed.COPIED, 5, None),
        ("tiny on 1 rank", distributed.SHARDED, 5, None),
        ("tiny on 2 ranks", distributed.COPIED, 5, None),
        ("tiny on 2 ranks", distributed.SHARDED, 5, None),
        ("tiny on 2 ranks", distributed.EXCHANGE, 5, 8 * (len(list(models.tiny().parameters())) + 1)),
    ]


def test_the_page_of_several_processes_keeps_what_is_written_by_hand(tmp_path: Path) -> None:
    samples = {("x on 1 rank", name): [2.0, 1.0, 9.0] for name in (distributed.COPIED, distributed.SHARDED)}
    samples |= {
        ("x on 2 ranks", name): [4.0] for name in (distributed.COPIED, distributed.SHARDED, distributed.EXCHANGE)
    }
    save(results("distributed", samples), tmp_path / "results" / "distributed-cpu.json")
    page = tmp_path / "docs" / "distributed.md"
    page.parent.mkdir()
    page.write_text("\n".join(["above", render.BEGIN.format("ranks"), "| old |", render.END.format("ranks"), "below"]))
    for _ in range(2):
        assert render.main(["--results", str(tmp_path / "results"), "--docs", str(page.parent)]) == 0
        text = page.read_text()
        assert text.startswith("above\n") and text.endswith("\nbelow") and "old" not in text
        assert "| x on 1 rank | 2 | 2 | none | 0 | 3 |" in text
        assert "| x on 2 ranks | 4 | 4 | 4 | 20000000 | 1 |" in text
    page.write_text("no such lines")
    with pytest.raises(SystemExit, match="must hold the lines"):
        render.main(["--results", str(tmp_path / "results"), "--docs", str(page.parent)])


@pytest.mark.parametrize(
    ("late", "fault"),
    [
        ({}, None),
        ({"resident_mib": 109.0}, "memory grew by 9.0 MiB"),
        ({"foreach_drift": 2e-5}, "foreach drifted by 2.0e-05"),
        ({"single_us": 140.0}, "single became slower, 1.40 times"),
        # the machine became slower
        ({"single_us": 140.0, "foreach_us": 140.0, "fused_us": 140.0, "torch SGD_us": 70.0}, None),
    ],
)
def test_a_long_run_fails_where_a_bound_breaks(late: dict[str, float], fault: str | None) -> None:
    block: dict[str, Any] = {"step": 1000, "loss": 1.0, "resident_mib": 100.0, "objects": 1000, "torch SGD_us": 50.0}
    for name in long_run.IMPLEMENTATIONS:
        block |= {f"{name}_us": 100.0, f"{name}_drift": 1e-7}
    text, faults = long_run.summary([block] * 18 + [block | late] * 2)
    assert [fault in each for each in faults] == ([] if fault is None else [True])
    assert text.count("\n| ") == 1 + len(long_run.IMPLEMENTATIONS) + 1 + 1
