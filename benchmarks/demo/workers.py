"""Training runs in parallel: processes of one thread each, which is faster than one process of many threads here."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Self

import torch

from .data import Dataset
from .training import Protocol, Result, Run, train

_shared: tuple[Protocol, Dataset]


def _start(protocol: Protocol, dataset: Dataset) -> None:
    """Hold the images in the process, so that they are sent once and not with every run."""
    global _shared  # noqa: PLW0603 - an initializer of a process can leave something to its tasks in no other way
    _shared = (protocol, dataset)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its processes: they would train on, unseen."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train(run: Run) -> Result:
    return train(run, *_shared)


class Workers:
    """Processes that train runs on one data set under one protocol."""

    def __init__(self, processes: int, protocol: Protocol, dataset: Dataset) -> None:
        # spawn: a fork of a process in which torch has started its threads may hang
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(processes, context, _start, (protocol, dataset))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for process in multiprocessing.active_children():
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def train(self, runs: Sequence[Run], finished: Callable[[Result], None]) -> list[Result]:
        """Train every run, in any order, and return the results in the order of `runs`.

        Args:
            runs: What to train. Small batches take longest, so they start first.
            finished: Called with each result, in the order in which they come.
        """
        order = sorted(range(len(runs)), key=lambda i: runs[i].batch)
        with _interrupt_ignored():
            futures: dict[Future[Result], int] = {self._pool.submit(_train, runs[i]): i for i in order}
        results: dict[int, Result] = {}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            finished(results[futures[future]])
        return [results[i] for i in range(len(runs))]


@contextmanager
def _interrupt_ignored() -> Iterator[None]:
    """Processes started in here ignore Ctrl-C, so that one process alone answers it, and without a traceback."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
