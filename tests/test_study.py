"""The study: equal searches, a test split that no choice sees, a store that a killed run goes on from, a page that says what it holds."""

from __future__ import annotations

import csv
import hashlib
import math
import os
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch

for module in ("sklearn", "matplotlib", "rich"):
    pytest.importorskip(module, reason="the study has the demo's dependencies: group demo")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks/ is no part of the package; it is run from the repository root

from benchmarks.study.methods import AT_LARGEST, BATCH_NORM, CUT, FAMILY, MAIN, ONE_LR, OWN_LR, PROTOCOLS
from benchmarks.study.outcome import Outcome
from benchmarks.study.store import Store, StoreError

from benchmarks.demo import training
from benchmarks.demo.data import FILES, IMAGES_MAGIC, LABELS_MAGIC, idx_digits
from benchmarks.demo.search import Grid, search
from benchmarks.demo.training import Method, Protocol, Result, Run
from benchmarks.study import __main__ as program
from benchmarks.study import page, report

QUICK = PROTOCOLS["quick"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of ten classes that can be told apart: a bright row each, under noise."""
    folder = tmp_path_factory.mktemp("digits")
    noise = torch.Generator().manual_seed(0)
    for which, count in (("train", 400), ("test", 50)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 120, (count, 12, 12), generator=noise)
        images[torch.arange(count), labels] += 100
        pixels = bytes(images.to(torch.uint8).flatten().tolist())
        (folder / FILES[f"{which} images"]).write_bytes(struct.pack(">4I", IMAGES_MAGIC, count, 12, 12) + pixels)
        (folder / FILES[f"{which} labels"]).write_bytes(
            struct.pack(">2I", LABELS_MAGIC, count) + bytes(labels.tolist())
        )
    return folder


class Trained:
    """Workers in this process, which count what they train and what looks at the test images."""

    runs: ClassVar[list[Run]] = []

    def __init__(self, _: int, protocol: Protocol, dataset: Any) -> None:
        self.protocol, self.dataset = protocol, dataset

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def train(self, runs: Sequence[Run], finished: Callable[[Result], None]) -> list[Result]:
        results = []
        for run in runs:
            dataset = WatchedDataset(self.dataset)
            results.append(training.train(run, self.protocol, dataset))  # type: ignore[arg-type]
            assert dataset.tests_read == int(run.final)
            Trained.runs.append(run)
            finished(results[-1])
        return results


class WatchedDataset:
    def __init__(self, dataset: Any) -> None:
        self.train, self.validation, self._test, self.tests_read = dataset.train, dataset.validation, dataset.test, 0

    @property
    def test(self) -> Any:
        self.tests_read += 1
        return self._test


def quick(digits: Path, out: Path) -> list[Run]:
    """Run the program to its end in this process; what it trained."""
    Trained.runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "Workers", Trained)
        assert program.main(["--quick", "--data", str(digits), "--out", str(out)]) == 0
    return Trained.runs


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert quick(digits, out)
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "study.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


SETTING = ("optimizer", "options", "clip", "bias_lr", "adapt_all", "batch_norm", "batch")


def trials(out: Path) -> dict[tuple[str, ...], dict[float, tuple[float, float]]]:
    """Method and batch to lr to mean accuracy and negative mean loss, on the validation split; from the CSV alone."""
    found: dict[tuple[str, ...], dict[float, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows(out):
        if row["split"] == "validation":
            score = (float(row["accuracy_percent"]), -float(row["loss"]))
            found[tuple(row[name] for name in SETTING)][float(row["lr"])].append(score)
    return {
        key: {lr: tuple(map(statistics.mean, zip(*scores, strict=True))) for lr, scores in by_lr.items()}  # type: ignore[misc]
        for key, by_lr in found.items()
    }


def test_all_methods_at_a_batch_have_as_many_trials(finished: Path) -> None:
    counts: dict[tuple[str, str], set[int]] = defaultdict(set)
    for key, by_lr in trials(finished).items():
        counts[key[SETTING.index("batch")], key[SETTING.index("batch_norm")]].add(len(by_lr))
    assert len(counts) == 3  # two batches, and the larger one with batch-norm
    assert all(len(numbers) == 1 for numbers in counts.values()), counts
    per_batch = Counter(key[SETTING.index("batch")] for key in trials(finished))
    assert sorted(per_batch.values()) == [len(MAIN), len(MAIN) + len(AT_LARGEST) + len(BATCH_NORM)]


def test_what_is_tested_is_the_best_with_two_neighbours_and_nothing_else(finished: Path) -> None:
    tested: dict[tuple[str, ...], list[tuple[float, str]]] = defaultdict(list)
    for row in rows(finished):
        if row["split"] == "test":
            tested[tuple(row[name] for name in SETTING)].append((float(row["lr"]), row["seed"]))
    failed = 0
    for key, by_lr in trials(finished).items():
        best = max(sorted(by_lr), key=by_lr.__getitem__)
        below = sum(lr < best for lr in by_lr)
        if min(below, len(by_lr) - 1 - below) >= 2:
            assert sorted(tested.pop(key)) == [(best, str(seed)) for seed in QUICK.test_seeds]
        else:
            failed += 1
    assert not tested
    assert failed == (finished / "study.md").read_text(encoding="utf-8").count("failed: on the edge")


def test_no_search_has_a_seed_of_the_test(finished: Path) -> None:
    for protocol in PROTOCOLS.values():
        assert not set(protocol.search_seeds) & set(protocol.test_seeds)
    assert len(PROTOCOLS["1"].test_seeds) >= 5
    seeds = {
        split: {row["seed"] for row in rows(finished) if row["split"] == split} for split in ("validation", "test")
    }
    assert seeds["test"] == {"0", "1"}
    assert seeds["validation"] == {"100"}


def test_a_run_that_was_stopped_goes_on_with_the_same_results_and_trains_nothing_twice(
    digits: Path, finished: Path, tmp_path: Path
) -> None:
    content = (finished / "study.csv").read_bytes()
    lines = content.splitlines(keepends=True)
    kept = b"".join(lines[: len(lines) // 2])
    (tmp_path / "study.csv").write_bytes(kept + lines[len(lines) // 2][:40])  # a kill in the middle of a line
    trained = quick(digits, tmp_path)
    assert len(trained) == len(lines) - len(lines) // 2
    assert (tmp_path / "study.csv").read_bytes().startswith(kept)

    def without_time(out: Path) -> list[tuple[str, ...]]:
        return sorted(tuple(value for name, value in row.items() if name != "seconds") for row in rows(out))

    assert without_time(tmp_path) == without_time(finished)
    assert quick(digits, tmp_path) == []


def test_a_stored_result_comes_back_to_the_bit(tmp_path: Path) -> None:
    origin = {"protocol": "quick", "data": "none", "train_images": "512", "torch": "2"}
    run = Run(MAIN[-1].method, 128, 0.1 * 2**0.5, 100, final=True)
    result = Result(run, 100 / 3, math.inf, 1.0, {"conv1": [0.5, 0.25]})
    Store(tmp_path / "new" / "study.csv", QUICK, origin, (10, 20)).add(result)
    again = Store.recorded(tmp_path / "new" / "study.csv")
    assert again.result(run) == result
    assert replace(run, lr=0.1414) not in again
    assert replace(run, final=False) not in again


def test_a_killed_study_leaves_whole_runs(digits: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.study", "--quick", "--data", str(digits), "--out", str(tmp_path)]
    store = tmp_path / "study.csv"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        ended = time.monotonic() + 300
        while not (store.exists() and store.read_bytes().count(b"\n") > 3):
            assert process.poll() is None
            assert time.monotonic() < ended
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    found = Store.recorded(store)
    assert len(found) >= 3
    assert all(row["accuracy_percent"] for row in rows(tmp_path)[: len(found)])


def test_runs_of_another_origin_are_not_mixed(digits: Path, finished: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "digits"
    shutil.copytree(digits, other)
    labels = other / FILES["test labels"]
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x01")
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert program.main(["--quick", "--data", str(other), "--out", str(out)]) == 2
    assert "holds runs of data" in capsys.readouterr().err
    (out / "study.csv").write_text("a,b\n1,2\n")
    assert program.main(["--quick", "--data", str(digits), "--out", str(out)]) == 2
    assert "is no store of this study" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--data", "nowhere"]], ids=["none given", "none there"])
def test_without_data_it_says_where_to_put_it(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("study: ")
    assert "--data" in message
    assert bool(arguments) or all(name in message for name in FILES.values())
    assert not (tmp_path / "out").exists()


def test_weights_and_order_of_a_seed_are_those_of_every_method(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = idx_digits(digits, CUT)
    seen: list[str] = []
    build, permute = training.build_optimizer, torch.randperm

    def watched_build(model: torch.nn.Module, run: Run, protocol: Protocol) -> torch.optim.Optimizer:
        norms = {id(p) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
        seen.extend(digest(p) for p in model.parameters() if id(p) not in norms)
        return build(model, run, protocol)

    def watched_permute(count: int) -> torch.Tensor:
        order = permute(count)
        seen.append(digest(order))
        return order

    def digest(tensor: torch.Tensor) -> str:
        return hashlib.sha256(bytes(tensor.detach().contiguous().view(torch.uint8).flatten().tolist())).hexdigest()

    def digests(method: Method, seed: int) -> list[str]:
        seen.clear()
        training.train(Run(method, dataset.batches[-1], 0.01, seed), QUICK, dataset)
        return list(seen)

    monkeypatch.setattr(training, "build_optimizer", watched_build)
    monkeypatch.setattr(torch, "randperm", watched_permute)
    methods = [row.method for row in (*MAIN, *AT_LARGEST, *BATCH_NORM)]
    first = digests(methods[0], 0)
    assert len(first) == 8 + QUICK.epochs  # four layers' weights and biases
    assert all(digests(method, 0) == first for method in methods)
    assert digests(methods[0], 1) != first


def test_every_method_has_the_same_groups_and_the_options_of_its_row() -> None:
    for row in (*MAIN, *AT_LARGEST, *BATCH_NORM):
        model = training.build_model(14, 14, first_stride=2, batch_norm=row.method.batch_norm)
        optimizer = training.build_optimizer(model, Run(row.method, 8192, 0.5, 0), PROTOCOLS["1"])
        weights, rest = optimizer.param_groups
        assert [p.ndim for p in weights["params"]] == [4, 4, 2, 2]
        assert all(p.ndim == 1 for p in rest["params"])
        assert (weights["weight_decay"], rest["weight_decay"]) == (5e-4, 0.0)
        assert weights["lr"] == 0.5
        own = "own lr of other tensors" in row.knobs
        assert rest["lr"] == (OWN_LR[row.method.optimizer] if own else 0.5)
        assert ("threshold" in row.knobs) == (row.method.clip is not None) == ("clipping" in row.name)
        if row.method.optimizer == "LARS":
            assert (weights["adapt"], rest["adapt"]) == (True, "all tensors" in row.name)
            assert weights["trust_clip"] == ("larc" in row.name)
            assert (weights["trust_denominator"] == "joint") == ("byol" in row.name or "simclr" in row.name)
            assert weights["lr_in_momentum"] == ("paper" in row.name or "simclr" in row.name)
        assert bool(weights.get("nesterov")) == ("Nesterov" in row.name)


def test_clipping_bounds_the_norm_of_all_gradients(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(math.sqrt(sum(float(g.square().sum()) for g in grads)))
            super().step(closure)

    monkeypatch.setitem(training.OPTIMIZERS, "SGD", Watched)
    dataset = idx_digits(digits, CUT)
    method = Method("SGD", None, 0.1)
    training.train(Run(method, dataset.batches[0], 0.1, 0), QUICK, dataset)
    bound = statistics.median(norms)
    norms.clear()
    training.train(Run(replace(method, clip=bound), dataset.batches[0], 0.1, 0), QUICK, dataset)
    assert max(norms) == pytest.approx(bound, rel=1e-5)


PEAKED = Method("SGD", None, 1.0)


def peaked(peak: float) -> Callable[[list[Run]], list[Result]]:
    return lambda runs: [Result(run, 90 - abs(math.log2(run.lr / peak)), 0.0, 0.0) for run in runs]


@pytest.mark.parametrize("octaves", [-9, -2, -1, 0, 1, 2, 9])
def test_the_grid_moves_until_the_best_has_two_neighbours_then_two_half_steps(octaves: int) -> None:
    protocol = Protocol(neighbours=2, search_seeds=(0,))
    grid = search([PEAKED], [32], protocol, peaked(2.0**octaves))[32, PEAKED]
    assert grid.best_lr == 2.0**octaves
    assert grid.is_inside
    tried = sorted(grid.lr(k) for k in grid.trials)
    at = tried.index(grid.best_lr)
    assert tried[at - 2 : at + 3] == pytest.approx([grid.best_lr * 2.0**k for k in (-1, -0.5, 0, 0.5, 1)])
    assert len(tried) == 5 + abs(octaves) + 2


def test_a_best_on_the_edge_of_the_largest_grid_is_a_failed_row() -> None:
    grid = search([PEAKED], [32], Protocol(neighbours=2, most_trials=6, search_seeds=(0,)), peaked(8.0))[32, PEAKED]
    assert sorted(grid.trials) == [-4, -2, 0, 2, 4, 5, 6, 7]  # six, then the half-steps: 8 has no two beyond it
    assert grid.best_lr == 8.0
    assert not grid.is_inside


def graded(*accuracies: float) -> Grid:
    run = Run(PEAKED, 32, 1.0, 0)
    return Grid(1.0, {2 * k: [Result(run, accuracy, 0.0, 0.0)] for k, accuracy in enumerate(accuracies)})


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (graded(80, 90, 91.5, 91, 90.6, 85), "4"),
        (graded(80, 85, 91.5, 85, 91.4), "1"),  # beyond a gap
        (graded(91, 91.5, 85), "at least 2"),
        (graded(85, 91.5, 91), "at least 2"),
    ],
)
def test_the_plateau_is_what_lies_within_a_point_around_the_best(grid: Grid, words: str) -> None:
    assert report.plateau_words(grid) == words


def finals(*accuracies: float, first_seed: int = 0) -> list[Result]:
    return [Result(Run(PEAKED, 32, 1.0, first_seed + i), a, 0.0, 0.0) for i, a in enumerate(accuracies)]


def test_a_difference_is_paired_by_seed_and_its_interval_is_students() -> None:
    found = report.difference(finals(91, 82, 73, 94, 95), finals(90, 80, 70, 90, 90))
    assert found.mean == pytest.approx(3.0)
    assert found.half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)
    assert (found.verdict, str(found)) == ("better", "+3.0 ± 2.0")
    assert report.difference(finals(90, 80), finals(91, 81.5)).verdict == "tie"
    assert report.difference(finals(90, 80), finals(91, 81.01)).verdict == "worse"
    with pytest.raises(ValueError, match="paired by seed"):
        report.difference(finals(90, 80), finals(90, 80, first_seed=1))


@pytest.mark.parametrize("freedom", sorted(report.T))
def test_the_quantiles_leave_a_fortieth_on_either_side(freedom: int) -> None:
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    n = 20_000
    width = report.T[freedom] / n
    inside = sum((1 + ((i + 0.5) * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(n)) * width * scale
    assert inside == pytest.approx(0.475, abs=2e-5)


@pytest.mark.parametrize(
    ("own", "one", "tested", "expected"),
    [(70, 60, "both", "own"), (60, 70, "both", "one"), (60, 70, "own", "own"), (60, 70, "none", None)],
)
def test_lars_meets_the_variant_that_is_better_on_validation(own: int, one: int, tested: str, expected: str) -> None:
    rows = {"own": MAIN[0], "one": next(row for row in ONE_LR if row.name == MAIN[0].name)}
    grids = {(32, rows[which].method): graded(0, 0, best, 0, 0) for which, best in (("own", own), ("one", one))}
    finals_of = {(32, row.method): finals(90) if tested in (which, "both") else [] for which, row in rows.items()}
    found = report.rival(Outcome(QUICK, (32,), grids, finals_of), 32, MAIN[0])
    assert found == (rows[expected] if expected else None)


@pytest.fixture(scope="module")
def committed() -> Store:
    return Store.recorded(program.COMMITTED)


def test_the_committed_page_is_what_the_committed_runs_render(committed: Store, tmp_path: Path) -> None:
    page.write(committed, tmp_path, page.CONCLUSION)
    text = (program.DOCS / page.NAME).read_text(encoding="utf-8")
    assert text == (tmp_path / page.NAME).read_text(encoding="utf-8"), "run python -m benchmarks.study --render"
    pictures = sorted(path.name for path in (tmp_path / page.PICTURES).iterdir())
    assert pictures == sorted(path.name for path in (program.DOCS / page.PICTURES).iterdir())
    assert len(pictures) == 3 == sum(f"]({page.PICTURES}/{name})" in text for name in pictures)
    assert committed.origin["protocol"] == "1"


def test_the_conclusions_are_what_the_committed_runs_say(committed: Store) -> None:
    outcome = page.recorded(committed)
    smallest, largest = outcome.batches[0], outcome.largest

    def gaps(lars: Any, others: Sequence[Any], batch: int) -> dict[str, report.Difference]:
        return {row.name: gap for row, gap in report.comparisons(outcome, lars, others, batch)}

    main = {batch: gaps(report.LARS, MAIN, batch) for batch in outcome.batches}
    norm = gaps(report.LARS_NORM, BATCH_NORM, largest)
    one_lr = gaps(report.LARS_ONE_LR, ONE_LR, largest)
    assert all(abs(gap.mean) < 0.5 for gap in main[smallest].values())  # "nothing is gained"
    for other in ("AdamW", "SGD with clipping"):
        assert all(2 < main[batch][other].mean < 7 for batch in outcome.batches[2:])  # "a few points ahead"
        assert all(main[batch][other].verdict == "better" for batch in outcome.batches[2:])
        assert 0 < norm[other].mean < main[largest][other].mean  # "with batch-norm by less"
        assert one_lr[other].verdict == "worse"  # "falls behind"
    for batch in outcome.batches[1:]:  # "fails for some seeds and not for others"
        accuracies = [result.accuracy for result in outcome.finals[batch, MAIN[0].method]]
        assert main[batch]["SGD"].verdict == "tie"
        assert max(accuracies) - min(accuracies) > 30
    lars, clipping, adam = (
        {batch: report.plateau(outcome.grids[batch, row.method]).factor for batch in outcome.batches}
        for row in (MAIN[4], MAIN[2], MAIN[3])
    )
    assert lars[largest] == pytest.approx(clipping[largest])  # "as wide"
    assert lars[smallest] < adam[smallest]  # "narrower"
    assert all(widths[largest] < widths[smallest] for widths in (lars, clipping, adam))
    family = gaps(report.LARS, FAMILY, largest)
    assert family["all tensors adapted"].verdict == "tie"  # "as good"
    assert family["dialect larc"].mean < 3  # "gives up little"
    larc = next(row for row in FAMILY if row.name == "dialect larc")
    assert report.plateau(outcome.grids[largest, larc.method]).factor >= 16  # "hardly minds its lr"
    assert family["dialect timm_larc"].mean > 30
    assert all(family[name].verdict == "better" for name in ("dialect paper and mlperf", "dialect simclr"))


def test_the_committed_runs_are_all_that_the_protocol_asks_for_and_no_more(committed: Store, tmp_path: Path) -> None:
    lines = program.COMMITTED.read_text(encoding="utf-8").splitlines(keepends=True)
    at_test = next(i for i, line in enumerate(lines) if ",test," in line)
    (tmp_path / "study.csv").write_text("".join(lines[:at_test] + lines[at_test + 1 :]), encoding="utf-8")
    with pytest.raises(StoreError, match="lacks 1 of"):
        page.recorded(Store.recorded(tmp_path / "study.csv"))
    extra = lines[at_test].replace(",test,", ",validation,")
    (tmp_path / "study.csv").write_text("".join([*lines, extra]), encoding="utf-8")
    with pytest.raises(StoreError, match="holds 1 runs that the protocol does not ask for"):
        page.recorded(Store.recorded(tmp_path / "study.csv"))
    assert {row["seed"] for row in rows(program.COMMITTED.parent) if row["split"] == "test"} == set("01234")
