"""What is computed from an outcome: comparisons seed by seed, plateaus, the tables' rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.demo.report import mean_and_std
from benchmarks.demo.search import Grid
from benchmarks.demo.training import Result

from .methods import BATCH_NORM, MAIN, ONE_LR, Row
from .outcome import Outcome

LARS, LARS_ONE_LR, LARS_NORM = (next(row for row in rows if row.name == "LARS") for rows in (MAIN, ONE_LR, BATCH_NORM))
WITHIN = 1.0  # points of the best: the plateau
# Student's t for a two-sided interval of 95 %, by degrees of freedom
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Difference:
    """One method's test accuracy minus another's, in points: mean over the seeds, and half of its 95 % interval."""

    mean: float
    half: float

    @property
    def verdict(self) -> str:
        if abs(self.mean) > self.half:
            return "better" if self.mean > 0 else "worse"
        return "tie"

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.half:.1f}"


def difference(ours: Sequence[Result], theirs: Sequence[Result]) -> Difference:
    pairs = list(zip(ours, theirs, strict=True))
    if any(a.run.seed != b.run.seed for a, b in pairs):
        raise ValueError(f"runs must be paired by seed, got {[(a.run.seed, b.run.seed) for a, b in pairs]}")
    differences = [a.accuracy - b.accuracy for a, b in pairs]
    half = T[len(pairs) - 1] * statistics.stdev(differences) / math.sqrt(len(pairs))
    return Difference(statistics.mean(differences), half)


@dataclass(frozen=True)
class Plateau:
    low: float  # lrs
    high: float
    open: bool  # it reaches the edge of what was tried

    @property
    def factor(self) -> float:
        return self.high / self.low


def plateau(grid: Grid, within: float = WITHIN) -> Plateau:
    """The tried lrs around the best whose mean accuracy is within some points of it, none left out."""
    ks = sorted(grid.trials)
    good = [grid.score(k)[0] >= grid.score(grid.best)[0] - within for k in ks]
    low = high = ks.index(grid.best)
    while low > 0 and good[low - 1]:
        low -= 1
    while high < len(ks) - 1 and good[high + 1]:
        high += 1
    return Plateau(grid.lr(ks[low]), grid.lr(ks[high]), low == 0 or high == len(ks) - 1)


def plateau_words(grid: Grid, within: float = WITHIN) -> str:
    found = plateau(grid, within)
    return f"{'at least ' if found.open else ''}{found.factor:.2g}"


def rival(outcome: Outcome, batch: int, row: Row) -> Row | None:
    """The row of a method of table 1 that LARS is compared with; None if it failed.

    Where the variant with one lr for all tensors was tried too, that is the one better on validation.
    """
    rows = [row, *(other for other in ONE_LR if other.name == row.name)]
    known = [r for r in rows if outcome.finals.get((batch, r.method))]

    def score(row: Row) -> tuple[float, float]:
        grid = outcome.grids[batch, row.method]
        return grid.score(grid.best)

    return max(known, key=score, default=None)


def comparisons(outcome: Outcome, lars: Row, rows: Sequence[Row], batch: int) -> Iterator[tuple[Row, Difference]]:
    """LARS minus each other method that did not fail; nothing if LARS failed."""
    if ours := outcome.finals.get((batch, lars.method)):
        for row in rows:
            if row.method != lars.method and (theirs := outcome.finals.get((batch, row.method))):
                yield row, difference(ours, theirs)


def cells(outcome: Outcome, batch: int, row: Row) -> list[str]:
    """Of a table's row: knobs, trials, lr, plateau, validation, test, its range."""
    grid = outcome.grids[batch, row.method]
    searched = [str(1 + len(row.knobs)), str(len(grid.trials)), f"{grid.best_lr:.3g}"]
    if outcome.failed(batch, row):
        return [*searched, "failed: on the edge", *[""] * 3]
    finals = outcome.finals[batch, row.method]
    accuracies = [result.accuracy for result in finals]
    return [
        *searched,
        plateau_words(grid),
        f"{grid.score(grid.best)[0]:.1f}",
        f"{mean_and_std(finals)[0]:.1f}",
        f"{min(accuracies):.1f} to {max(accuracies):.1f}",
    ]
