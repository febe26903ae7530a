"""The study: equal treatment, and a page that says what its runs hold."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

for module in ("sklearn", "rich"):
    pytest.importorskip(module, reason="the study has the demo's dependencies: group demo")

from benchmarks import study
from benchmarks.demo import training
from benchmarks.demo.data import Dataset, Split
from benchmarks.demo.search import Grid
from benchmarks.demo.training import Protocol, Result, Run

PAGE = Path(__file__).parents[1] / "docs" / "study.md"
ROWS = {"main": study.MAIN, "one lr": study.ONE_LR, "family": study.FAMILY, "batch-norm": study.BATCH_NORM}
METHODS = [(which, name, method) for which, rows in ROWS.items() for name, method in rows.items()]


def test_the_page_says_what_the_committed_runs_say_and_no_run_is_missing_or_superfluous() -> None:
    """The lrs are searched again, by the protocol's rules, in the committed runs."""
    found, stored = study.study(study.again), study.stored()
    searched = [result for grid in found.grids.values() for results in grid.trials.values() for result in results]
    finals = [result for results in found.finals.values() for result in results]
    assert {tuple(study.key(result.run).values()) for result in searched + finals} == stored.keys()
    assert len(stored) == len(searched) + len(finals)
    assert found.finals.keys() == found.grids.keys(), "no row failed"

    def gap(name: str, batch: int, which: str = "main", lars: str = "LARS") -> str:
        return study.difference(found.finals[batch, ROWS[which][lars]], found.finals[batch, ROWS[which][name]])

    text = PAGE.read_text(encoding="utf-8").replace("\n", " ")
    *others, _ = study.MAIN
    gaps = {batch: {name: gap(name, batch) for name in others} for batch in study.BATCHES}
    norm = {name: gap(name, study.LARGEST, "batch-norm") for name in others}
    points = {batch: {name: float(g.split()[0]) for name, g in row.items()} for batch, row in gaps.items()}
    assert "it loses none of the 20 comparisons" in text
    assert not any("worse" in verdict for row in (*gaps.values(), norm) for verdict in row.values())
    assert "At batch 256 nothing is gained" in text and max(points[256].values()) < 0.5
    assert "LARS is a few points ahead of AdamW and of clipping, and by less with batch-norm" in text
    assert "With one lr for all tensors it falls behind clipping and AdamW" in text
    for name in ("AdamW", "SGD with clipping"):
        assert all(2 < points[batch][name] < 7 and "tie" not in gaps[batch][name] for batch in (4096, 8192))
        assert 0 < float(norm[name].split()[0]) < points[8192][name]
        assert "worse" in gap(f"{name}, one lr for all", study.LARGEST, "one lr", "LARS, one lr for all")
    drawn = []  # the picture's text alternative
    for name, method in study.MAIN.items():
        means = [statistics.mean(r.accuracy for r in found.finals[batch, method]) for batch in study.BATCHES]
        drawn.append(f"{name} " + ", ".join(f"{mean:.1f}" for mean in means))
    assert "; ".join(drawn) in text


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
    digits, protocol, build = Dataset("digits", split, split, split, (32, 64)), Protocol(2, 1), training.build_model
    seen: list[list[Any]] = []

    def watched(*args: Any) -> torch.nn.Sequential:
        model = build(*args)
        seen.append([p.tolist() for name, p in model.named_parameters() if "norm" not in name])
        model.register_forward_pre_hook(lambda _, inputs: seen[-1].append(inputs[0].tolist()))
        return model

    monkeypatch.setattr(training, "build_model", watched)
    for run in [Run(method, 32, 0.01, seed) for seed in (0, 1) for *_, method in METHODS]:
        training.train(run, protocol, digits)
    (first, *same), (other, *_) = seen[: len(METHODS)], seen[len(METHODS) :]
    assert len(first) == 8 + 4 + 1  # weights and biases of four layers, two batches an epoch, the validation split
    assert all(run == first for run in same)
    assert not any(one == another for one, another in zip(first[:-1], other, strict=False))


def test_the_plateau_is_what_lies_within_a_point_around_the_best() -> None:
    def plateau(*accuracies: float) -> str:
        run = Run(study.MAIN["SGD"], 32, 1.0, 0)
        return study.plateau(Grid(1.0, {2 * k: [Result(run, a, 0.0, 0.0)] for k, a in enumerate(accuracies)}))

    assert plateau(80, 90, 91.5, 91, 90.6, 85) == "4"
    assert plateau(80, 85, 91.5, 85, 91.4) == "1", "what lies beyond a gap does not count"
    assert plateau(91, 91.5, 85) == "at least 2"


def test_a_difference_is_paired_by_seed_and_its_interval_is_students() -> None:
    def finals(*accuracies: float) -> list[Result]:
        return [Result(Run(study.MAIN["SGD"], 32, 1.0, seed), a, 0.0, 0.0) for seed, a in enumerate(accuracies)]

    assert study.difference(finals(91, 82, 73, 94, 95), finals(90, 80, 70, 90, 90)) == "+3.0 ± 2.0"
    assert study.difference(finals(90, 80), finals(91, 81.5)) == "-1.2 ± 3.2, tie"
    assert study.difference(finals(90, 80), finals(91, 81.01)).endswith("worse")
    assert study.difference([], finals(90, 80)) == "failed"
