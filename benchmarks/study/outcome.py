"""The study as a function of a way to train: searches, then final runs. With a store for that way it is read, not trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.demo.search import Grid, search
from benchmarks.demo.training import Method, Protocol, Result, Run

from .methods import AT_LARGEST, BATCH_NORM, CUT, MAIN, Row

Train = Callable[[str, list[Run]], list[Result]]  # what for, in a word; which; their results in the same order


@dataclass(frozen=True)
class Outcome:
    """What was found at each batch; the grids' trials are on the validation split, the finals on the test split."""

    protocol: Protocol
    batches: tuple[int, ...]
    grids: dict[tuple[int, Method], Grid]
    finals: dict[tuple[int, Method], list[Result]]  # none for a row that failed

    @property
    def largest(self) -> int:
        return self.batches[-1]

    def steps(self, batch: int) -> int:
        """The largest batch is a part of the training split, and the others are parts of it."""
        return self.protocol.epochs * self.largest * CUT.parts[-1] // batch

    def failed(self, batch: int, row: Row) -> bool:
        """The best lr lies on the edge of the largest grid allowed: the row says nothing about the method."""
        return not self.grids[batch, row.method].is_inside

    def runs(self) -> list[Run]:
        trials = [r.run for grid in self.grids.values() for results in grid.trials.values() for r in results]
        return trials + [r.run for results in self.finals.values() for r in results]


def study(protocol: Protocol, batches: Sequence[int], train: Train) -> Outcome:
    """Search and test table by table, so that each is whole before the next begins.

    All methods of a search have the same number of trials. No test comes before all searches of its table have ended, and
    no search sees a test.
    """
    *smaller, largest = batches
    grids: dict[tuple[int, Method], Grid] = {}
    finals: dict[tuple[int, Method], list[Result]] = {}
    for name, rows, at in (
        (f"batch {largest}", (*MAIN, *AT_LARGEST), (largest,)),
        ("smaller batches", MAIN, tuple(smaller)),
        (f"batch norm, batch {largest}", BATCH_NORM, (largest,)),
    ):
        methods = [row.method for row in rows]
        found = search(methods, at, protocol, lambda runs, name=name: train(f"{name}: search", runs))  # type: ignore[misc]
        keys = [key for key, grid in found.items() if grid.is_inside]
        seeds = protocol.test_seeds
        results = train(
            f"{name}: test",
            [Run(method, batch, found[batch, method].best_lr, s, final=True) for batch, method in keys for s in seeds],
        )
        grids |= found
        finals |= {key: results[i * len(seeds) : (i + 1) * len(seeds)] for i, key in enumerate(keys)}
    return Outcome(protocol, tuple(batches), grids, finals)
