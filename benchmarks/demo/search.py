"""The search for the lr. A grid grows until its best lr lies inside, and all methods get the same number of trials."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .training import Method, Protocol, Result, Run

COARSE = 2  # half-steps between neighbours of the first grid


@dataclass
class Grid:
    """The trials of one method at one batch.

    Trial k has lr = middle * 2 ** (k / 2). Even k extend the grid by factors of 2, and odd k refine it.
    """

    middle: float
    trials: dict[int, list[Result]] = field(default_factory=dict)
    neighbours: int = 1  # trials that the best must have on either side to lie inside

    def lr(self, k: int) -> float:
        return float(self.middle * 2 ** (k / 2))

    def score(self, k: int) -> tuple[float, float]:
        """Mean validation accuracy, then the negative mean loss, which decides between equal accuracies."""
        results = self.trials[k]
        return statistics.fmean(r.accuracy for r in results), -statistics.fmean(r.loss for r in results)

    @property
    def best(self) -> int:
        return max(sorted(self.trials), key=self.score)

    @property
    def best_lr(self) -> float:
        return self.lr(self.best)

    @property
    def is_inside(self) -> bool:
        below = sum(k < self.best for k in self.trials)
        return min(below, len(self.trials) - 1 - below) >= self.neighbours

    def next_trial(self) -> int:
        """The next trial, on the side on which the best lies nearer to the edge."""
        low, high = min(self.trials), max(self.trials)
        return low - COARSE if self.best - low < high - self.best else high + COARSE


def next_trials(grids: Sequence[Grid], protocol: Protocol) -> list[list[int]]:
    """The next trials for the grids of all methods at one batch. If no grid has any, the search is over.

    If the best lr is on the edge of a grid, the grid gets a trial on that side, up to `most_trials`. Shorter grids grow too,
    until all have the same number of trials. Once the best lr of every grid lies inside, each grid gets two more trials,
    half-way (in the logarithm) between its best lr and the two neighbours.
    """
    first, most = protocol.first_trials, protocol.most_trials
    if not all(grid.trials for grid in grids):
        return [list(range(1 - first, first, COARSE)) for _ in grids]
    if any(k % COARSE for grid in grids for k in grid.trials):  # already refined
        return [[] for _ in grids]
    longest = max(len(grid.trials) for grid in grids)
    wanted = [
        [grid.next_trial()] if len(grid.trials) < min(longest + (not grid.is_inside), most) else [] for grid in grids
    ]
    return wanted if any(wanted) else [[grid.best - 1, grid.best + 1] for grid in grids]


def search(
    methods: Sequence[Method], batches: Sequence[int], protocol: Protocol, train: Callable[[list[Run]], list[Result]]
) -> dict[tuple[int, Method], Grid]:
    """Search all grids at once, round by round. The runs of a round do not wait for each other."""
    keys = itertools.product(batches, methods)
    grids = {(b, method): Grid(method.middle(b), neighbours=protocol.neighbours) for b, method in keys}
    while True:
        wanted: list[tuple[int, Method, int]] = []
        for batch in batches:
            trials = next_trials([grids[batch, method] for method in methods], protocol)
            wanted += [(batch, method, k) for method, ks in zip(methods, trials, strict=True) for k in ks]
        if not wanted:
            return grids
        seeds = protocol.search_seeds
        runs = [Run(method, batch, grids[batch, method].lr(k), seed) for batch, method, k in wanted for seed in seeds]
        results = iter(train(runs))
        for batch, method, k in wanted:
            grids[batch, method].trials[k] = [next(results) for _ in seeds]
