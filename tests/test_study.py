"""The study: equal treatment, and a page that says what its runs hold."""

import re
import statistics
from typing import Any

import pytest
import torch

import pages
from benchmarks import study
from benchmarks.demo import training
from benchmarks.demo.data import Dataset, Split
from benchmarks.demo.search import Grid
from benchmarks.demo.training import Protocol, Result, Run

ROWS = {"main": study.MAIN, "one lr": study.ONE_LR, "family": study.FAMILY, "batch-norm": study.BATCH_NORM}
pytestmark = pytest.mark.skipif(torch.__version__ < (2, 6), reason="torch's optimizers take named groups from 2.6 on")
METHODS = [(which, name, method) for which, rows in ROWS.items() for name, method in rows.items()]


def test_the_conclusions_of_the_page_are_what_the_committed_runs_say() -> None:
    """The lrs are searched again in them. That the page's tables are of these runs, test_figures.py tests."""
    found, page = study.study(study.again), (pages.ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    runs = [*found.finals.values(), *(results for grid in found.grids.values() for results in grid.trials.values())]
    assert sum(map(len, runs)) == len(study.stored()), "none is superfluous"
    assert found.finals.keys() == found.grids.keys(), "no row failed"
    text, others = page.replace("\n", " "), [name for name in study.MAIN if name != "LARS"]
    first_table = [re.findall(rf"^\| {name} \| (.*) \|$", page, re.MULTILINE)[0].split(" | ") for name in others]
    points = {name: [float(gap.split()[0]) for gap in row] for name, row in zip(others, first_table, strict=True)}
    assert "it loses none of the 20 comparisons" in text
    assert sum("worse" not in gap for row in first_table for gap in row) == 20
    assert "At batch 256 LARS gains at most 0.3 points" in text and all(row[0] <= 0.3 for row in points.values())
    assert "At 4096 and 8192 LARS is a few points ahead of AdamW and clipping. Batch-norm reduces this lead" in text
    assert "With one lr for all tensors LARS falls behind clipping and AdamW" in text
    one_lr = [found.finals[study.LARGEST, study.ONE_LR[f"{name}, one lr for all"]] for name in study.MAIN]
    for name in ("AdamW", "SGD with clipping"):
        *_, at_4096, at_8192, norm = points[name]
        assert 2 < at_4096 < 7 and 2 < at_8192 < 7 and 0 < norm < at_8192
        assert "worse" in study.difference(one_lr[-1], one_lr[others.index(name)])
    for name, method in study.MAIN.items():  # in the picture's text alternative
        means = [statistics.mean(r.accuracy for r in found.finals[batch, method]) for batch in study.BATCHES]
        assert f"{name} {', '.join(f'{mean:.1f}' for mean in means)}" in text


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
