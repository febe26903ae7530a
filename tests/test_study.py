"""The study: equal treatment, and a page that says what its runs hold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

for module in ("sklearn", "rich"):
    pytest.importorskip(module, reason="the study has the demo's dependencies: group demo")

ROOT = Path(__file__).parents[1]

from benchmarks import study
from benchmarks.demo import training
from benchmarks.demo.data import Dataset, Split
from benchmarks.demo.search import Grid
from benchmarks.demo.training import Method, Protocol, Result, Run

ROWS = {"main": study.MAIN, "one lr": study.ONE_LR, "family": study.FAMILY, "batch-norm": study.BATCH_NORM}
METHODS = [(which, name, method) for which, rows in ROWS.items() for name, method in rows.items()]


@pytest.fixture(scope="module")
def found() -> study.Study:
    """The committed runs, searched again by the protocol's rules."""
    return study.study(study.again)


def test_the_committed_runs_are_all_that_the_protocol_asks_for_and_no_more(found: study.Study) -> None:
    searched = [result for grid in found.grids.values() for results in grid.trials.values() for result in results]
    finals = [result for results in found.finals.values() for result in results]
    stored = study.stored()
    assert {tuple(study.key(result.run).values()) for result in searched + finals} == stored.keys()
    assert len(stored) == len(searched) + len(finals)
    assert all(grid.is_inside for grid in found.grids.values()), "no row failed"
    seeds = [{result.run.seed for result in part} for part in (searched, finals)]
    assert not seeds[0] & seeds[1] and len(seeds[1]) == 5
    for batch in study.BATCHES:
        for norm in (False, True):
            of_batch = [len(grid.trials) for (b, m), grid in found.grids.items() if (b, m.batch_norm) == (batch, norm)]
            assert len(set(of_batch)) == (batch == study.LARGEST or not norm), "all methods have as many trials"


def test_the_conclusions_of_the_page_are_what_the_committed_runs_say(found: study.Study) -> None:
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8").replace("\n", " ")

    def gap(name: str, batch: int = study.LARGEST, rows: str = "main", lars: Method = study.MAIN["LARS"]) -> str:
        return study.difference(found.finals[batch, lars], found.finals[batch, ROWS[rows][name]])

    def mean(*args: Any) -> float:
        return float(gap(*args).split(" ")[0])

    others = [name for name in study.MAIN if name != "LARS"]
    assert "it loses none of the 20 comparisons" in text
    norm = {name: gap(name, study.LARGEST, "batch-norm", study.BATCH_NORM["LARS"]) for name in others}
    verdicts = [*(gap(name, batch) for batch in study.BATCHES for name in others), *norm.values()]
    assert len(verdicts) == 20 and not any("worse" in verdict for verdict in verdicts)
    assert "At batch 256 nothing is gained" in text
    assert all(abs(mean(name, 256)) < 0.5 for name in others)
    assert "LARS is a few points ahead of AdamW and of clipping, and by less with batch-norm" in text
    assert "With one lr for all tensors it falls behind clipping and AdamW" in text
    one = study.ONE_LR["LARS, one lr for all"]
    for name in ("AdamW", "SGD with clipping"):
        assert all(2 < mean(name, batch) < 7 and "tie" not in gap(name, batch) for batch in (4096, 8192))
        assert 0 < float(norm[name].split(" ")[0]) < mean(name)
        assert "worse" in gap(f"{name}, one lr for all", study.LARGEST, "one lr", one)
    words = []  # in the picture's text alternative
    for name in study.MAIN:
        finals = [found.finals[batch, study.MAIN[name]] for batch in study.BATCHES]
        words.append(f"{name} " + ", ".join(f"{statistics.mean(r.accuracy for r in some):.1f}" for some in finals))
    assert "; ".join(words) in text


def test_every_method_has_the_same_groups_and_the_options_of_its_row() -> None:
    for which, name, method in METHODS:
        model = training.build_model(14, 14, 2, method.batch_norm)
        weights, rest = training.build_optimizer(model, Run(method, 8192, 0.5, 0), study.PROTOCOL).param_groups
        assert [p.ndim for p in weights["params"]] == [4, 4, 2, 2] and all(p.ndim == 1 for p in rest["params"])
        assert (weights["weight_decay"], rest["weight_decay"], weights["lr"]) == (5e-4, 0.0, 0.5)
        one_lr = which == "one lr" or name == "all tensors adapted"
        assert rest["lr"] == (0.5 if one_lr else study.OWN_LR[method.optimizer])
        assert (method.clip is not None) == ("clipping" in name) and method.batch_norm == (which == "batch-norm")
        assert bool(weights.get("nesterov")) == ("Nesterov" in name)


def test_weights_and_order_of_a_seed_are_those_of_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split(torch.randn(64, 1, 12, 12), torch.arange(64) % 10)
    digits, protocol = Dataset("digits", split, split, split, (32, 64)), Protocol(2, 1, first_stride=2)
    seen: list[float] = []
    build, permute = training.build_optimizer, torch.randperm

    def watched_build(model: torch.nn.Module, *rest: Any) -> torch.optim.Optimizer:
        seen.extend(float(p.detach().sum()) for name, p in model.named_parameters() if "norm" not in name)
        return build(model, *rest)

    def watched_permute(count: int) -> torch.Tensor:
        order = permute(count)
        seen.append(float((order * torch.arange(count)).sum()))
        return order

    def watched(method: Method, seed: int) -> list[float]:
        seen.clear()
        training.train(Run(method, 64, 0.01, seed), protocol, digits)
        return list(seen)

    monkeypatch.setattr(training, "build_optimizer", watched_build)
    monkeypatch.setattr(torch, "randperm", watched_permute)
    first = watched(METHODS[0][2], 0)
    assert len(first) == 8 + protocol.epochs  # four layers' weights and biases
    assert all(watched(method, 0) == first for *_, method in METHODS)
    assert all(one != other for one, other in zip(first, watched(METHODS[0][2], 1), strict=True))


def test_what_a_study_writes_is_read_again_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Run(study.MAIN["LARS"], 256, 0.1 * 2**0.5, seed, final=True) for seed in range(3)]

    def train_all(runs: list[Run], _protocol: object, _data: object, finished: Callable[[Result], None]) -> None:
        for run in runs:
            finished(Result(run, 100 / 3, math.inf, 1.0))

    monkeypatch.setattr(study, "idx_digits", lambda *_: None)
    monkeypatch.setattr(study, "train_all", train_all)
    monkeypatch.setattr(study, "study", lambda train: train(runs))
    study.train(tmp_path, tmp_path / "study.csv")
    written = {tuple(study.key(run).values()): [100 / 3, math.inf, 1.0] for run in runs}
    assert study.stored(tmp_path / "study.csv") == written


def graded(*accuracies: float) -> Grid:
    run = Run(study.MAIN["SGD"], 32, 1.0, 0)
    return Grid(1.0, {2 * k: [Result(run, accuracy, 0.0, 0.0)] for k, accuracy in enumerate(accuracies)})


def test_the_plateau_is_what_lies_within_a_point_around_the_best() -> None:
    assert study.plateau(graded(80, 90, 91.5, 91, 90.6, 85)) == "4"
    assert study.plateau(graded(80, 85, 91.5, 85, 91.4)) == "1", "what lies beyond a gap does not count"
    assert study.plateau(graded(91, 91.5, 85)) == "at least 2"


def test_a_difference_is_paired_by_seed_and_its_interval_is_students() -> None:
    def finals(*accuracies: float) -> list[Result]:
        return [Result(Run(study.MAIN["SGD"], 32, 1.0, seed), a, 0.0, 0.0) for seed, a in enumerate(accuracies)]

    assert study.difference(finals(91, 82, 73, 94, 95), finals(90, 80, 70, 90, 90)) == "+3.0 ± 2.0"
    assert study.difference(finals(90, 80), finals(91, 81.5)) == "-1.2 ± 3.2, tie"
    assert study.difference(finals(90, 80), finals(91, 81.01)).endswith("worse")
    assert study.difference([], finals(90, 80)) == "failed"
