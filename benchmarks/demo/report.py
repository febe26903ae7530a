"""What comes out: the table (terminal and Markdown) and the CSV of every run."""

from __future__ import annotations

import csv
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from rich.text import Text

import fastlars
from benchmarks.results import fingerprint

from .data import Dataset
from .search import Grid
from .training import BIAS_LR, Method, Protocol, Result

HEADER = ("batch", "optimizer", "bias lr", "trials", "lr", "valid.", "test", "std")

LEGEND = (
    "Accuracy in percent on the validation and test split, means over the seeds; std: sample standard deviation of test. "
    "bias lr: that of the weights (same) or its own. *: the best lr is on the edge of the largest grid allowed."
)


@dataclass(frozen=True)
class Study:
    """Everything that was run, by batch and method."""

    dataset: Dataset
    protocol: Protocol
    methods: tuple[Method, ...]
    grids: dict[tuple[int, Method], Grid]
    finals: dict[tuple[int, Method], list[Result]]
    quick: bool

    @property
    def largest(self) -> int:
        return self.dataset.batches[-1]

    @property
    def remark(self) -> str:
        return " (--quick: proves that it runs, says nothing about the optimizers)" if self.quick else ""


def mean_and_std(results: Sequence[Result]) -> tuple[float, float]:
    """Mean and sample standard deviation over the seeds, in percent."""
    accuracies = [result.accuracy for result in results]
    return statistics.mean(accuracies), statistics.stdev(accuracies)


def describe(dataset: Dataset, protocol: Protocol) -> list[str]:
    """The protocol, one sentence a line."""
    search_seeds, test_seeds = (", ".join(map(str, seeds)) for seeds in (protocol.search_seeds, protocol.test_seeds))
    sizes = [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)]
    return [
        f"Data: {dataset.name}; {sizes[0]} train, {sizes[1]} choose the lr, {sizes[2]} test.",
        (
            f"The same for all: {protocol.epochs} epochs at every batch, linear warm-up over {protocol.warmup_epochs}, then "
            f"polynomial decay (power 2); momentum {protocol.momentum:g}; weight decay {protocol.weight_decay:g} on "
            "weights, none on biases (there are no norm layers); initial weights and image order set by the seed alone."
        ),
        f"Biases: never scaled by LARS; in both optimizers once with the lr of the weights, once with lr {BIAS_LR:g}.",
        (
            f"lr: {protocol.first_trials} trials a factor 2 apart or more, until the best of every method lies inside its "
            "grid, then one half-way to either neighbour; as many trials for every method at a batch; "
            f"judged by mean validation accuracy (seeds {search_seeds})."
        ),
        f"Test: fresh seeds ({test_seeds}) at the chosen lr; the test split is read once, for these runs.",
    ]


def bias_lr(method: Method) -> str:
    return "same" if method.bias_lr is None else f"{method.bias_lr:g}"


def rows(study: Study) -> Iterator[tuple[str, ...]]:
    for batch in study.dataset.batches:
        for method in study.methods:
            grid, finals = study.grids[batch, method], study.finals[batch, method]
            mean, std = mean_and_std(finals)
            yield (
                str(batch),
                method.optimizer,
                bias_lr(method),
                str(len(grid.trials)),
                f"{grid.best_lr:.3g}{'' if grid.is_inside else ' *'}",
                f"{grid.score(grid.best)[0]:.1f}",
                f"{mean:.1f}",
                f"{std:.1f}",
            )


def terminal_table(study: Study) -> Table:
    table = Table(box=box.SIMPLE, title=Text(f"{study.dataset.name}{study.remark}"), caption=LEGEND)
    for column in HEADER:
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    previous = ""
    for row in rows(study):
        if previous and row[0] != previous:
            table.add_section()
        table.add_row(*row)
        previous = row[0]
    return table


def write_markdown(study: Study, path: Path, seconds: float) -> None:
    """The table, the protocol, and where it was run."""
    lines = [
        f"# SGD and LARS at growing batches{study.remark}",
        "",
        LEGEND,
        "",
        "| " + " | ".join(HEADER) + " |",
        "| " + " | ".join("---" if column == "optimizer" else "---:" for column in HEADER) + " |",
        *("| " + " | ".join(row) + " |" for row in rows(study)),
        "",
        *(f"- {sentence}" for sentence in describe(study.dataset, study.protocol)),
        (
            f"- {seconds:.0f} s with {platform.system()} on {platform.machine()}, Python {platform.python_version()}, "
            f"torch {torch.__version__}, fastlars {fastlars.__version__}."
        ),
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def write_csv(study: Study, path: Path) -> None:
    """One line a run, search and test: settings first, then what came out."""
    protocol = study.protocol
    header = "phase split optimizer bias_lr batch lr chosen seed epochs warmup_epochs momentum weight_decay"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*header.split(), "accuracy_percent", "loss", "seconds"])
        for phase, split, result in _all_runs(study):
            run = result.run
            chosen = run.lr == study.grids[run.batch, run.method].best_lr
            writer.writerow(
                (
                    *(
                        phase,
                        split,
                        run.method.optimizer,
                        bias_lr(run.method),
                        run.batch,
                        run.lr,
                        int(chosen),
                        run.seed,
                    ),
                    *(protocol.epochs, protocol.warmup_epochs, protocol.momentum, protocol.weight_decay),
                    *(f"{result.accuracy:.4f}", f"{result.loss:.6g}", f"{result.seconds:.3f}"),
                )
            )


def read_csv(path: Path) -> list[dict[str, str]]:
    """What `write_csv` wrote: a run a row."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def drawn_from(runs: list[dict[str, str]]) -> str:
    """The fingerprint of the picture of these runs; how long they took is no part of it."""
    return fingerprint(*[{key: value for key, value in run.items() if key != "seconds"} for run in runs])


def _all_runs(study: Study) -> Iterator[tuple[str, str, Result]]:
    for grid in study.grids.values():
        for k in sorted(grid.trials):
            for result in grid.trials[k]:
                yield "search", "validation", result
    for results in study.finals.values():
        for result in results:
            yield "final", "test", result
