"""The results that the demo stores: the trials of the search, and the final runs.

The table of docs/start.md and the picture are made from them.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from .search import Grid
from .training import BIAS_LR, LARS, LARS_ONE_LR, SGDS, Method, Protocol, Result

Row = dict[str, str]  # a row of a CSV

METHODS = {"LARS": (LARS,), "SGD": SGDS, "LARS, one lr": (LARS_ONE_LR,)}
TITLES = {
    "LARS": f"LARS, biases at lr {BIAS_LR:g}",
    "SGD": f"SGD, one lr or biases at lr {BIAS_LR:g}",
    "LARS, one lr": "LARS, one lr for all",
}
FAILED = 50.0  # percent; a run with a lower accuracy has not trained


def read(path: Path) -> list[Row]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def write(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _row(method: Method, batch: int, **more: object) -> Row:
    biases = "same" if method.bias_lr is None else f"{method.bias_lr:g}"
    row = {"batch": batch, "optimizer": method.optimizer, "bias_lr": biases, **more}
    return {name: str(value) for name, value in row.items()}


def trials(grids: dict[tuple[int, Method], Grid]) -> list[Row]:
    """One row per lr of the search, with means over its seeds on the validation split."""
    rows = []
    for (batch, method), grid in grids.items():
        for k in sorted(grid.trials):
            lr, (accuracy, loss) = {"lr": grid.lr(k), "seeds": len(grid.trials[k])}, grid.score(k)
            rows.append(_row(method, batch, **lr, accuracy_percent=f"{accuracy:.4f}", loss=f"{-loss:.6g}"))
    return rows


def finals(named: Sequence[tuple[str, Result]], protocol: Protocol) -> list[Row]:
    """One row per run at a chosen lr, measured on the test split."""
    rows = []
    for name, result in named:
        run = result.run
        row = _row(run.method, run.batch, lr=run.lr, seed=run.seed, epochs=protocol.epochs)
        numbers = {"accuracy_percent": f"{result.accuracy:.4f}", "loss": f"{result.loss:.6g}"}
        rows.append({"name": name, **row, **numbers, "seconds": f"{result.seconds:.3f}"})
    return rows


def chosen(found: Sequence[Row], batches: Sequence[int]) -> dict[tuple[str, int], tuple[Method, float]]:
    """The best method and lr on the validation split, by name and batch. If accuracies are equal, the loss decides."""

    def best(name: str, batch: int) -> tuple[Method, float]:
        tried = [(m, row) for m in METHODS[name] for row in found if row.items() >= _row(m, batch).items()]
        method, row = max(tried, key=lambda trial: (float(trial[1]["accuracy_percent"]), -float(trial[1]["loss"])))
        return method, float(row["lr"])

    return {(name, batch): best(name, batch) for name in METHODS for batch in batches}


def accuracies(rows: Sequence[Row], name: str, batch: int) -> list[float]:
    return [float(row["accuracy_percent"]) for row in rows if (row["name"], row["batch"]) == (name, str(batch))]


def mean(rows: Sequence[Row], name: str, batch: int) -> float:
    return statistics.fmean(accuracies(rows, name, batch))


def batches(rows: Sequence[Row]) -> list[int]:
    return sorted({int(row["batch"]) for row in rows})


def one_lr(rows: Sequence[Row]) -> str:
    """One line on what goes wrong if all tensors share LARS's lr."""
    runs = [accuracy for batch in batches(rows) for accuracy in accuracies(rows, "LARS, one lr", batch)]
    *_, largest = batches(rows)
    failed = sum(accuracy < FAILED for accuracy in runs)
    return (
        f"With one lr for all tensors {failed} of {len(runs)} LARS runs did not train, and batch {largest} reached "
        f"{mean(rows, 'LARS, one lr', largest):.1f} % instead of {mean(rows, 'LARS', largest):.1f} %. LARS does not adapt "
        "biases, so they take steps at its full lr."
    )


def readme(rows: Sequence[Row]) -> Iterator[str]:
    """The measured part of docs/start.md."""
    seeds = len({row["seed"] for row in rows})
    yield f"Test accuracy in %, mean of {seeds} seeds, {rows[0]['epochs']} epochs; the last batch is the whole training set.\n"
    yield f"| batch | {TITLES['LARS']} | {TITLES['SGD']}, whichever is better |"
    yield "| ---: | ---: | ---: |"
    for batch in batches(rows):
        yield f"| {batch} | {mean(rows, 'LARS', batch):.1f} | {mean(rows, 'SGD', batch):.1f} |"
    yield f"\n{one_lr(rows)}\n"
