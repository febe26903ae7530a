"""Training runs in parallel: processes of one thread each, faster here than one process of many threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Self

import torch

from .data import Dataset
from .training import Protocol, Result, Run, train

_shared: tuple[Protocol, Dataset]


def _start(protocol: Protocol, dataset: Dataset) -> None:
    """Hold the images in the process, so that they are sent once and not with every run."""
    global _shared  # noqa: PLW0603  an initializer of a process can leave something to its tasks in no other way
    _shared = (protocol, dataset)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its processes, which would wait for work indefinitely."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train(run: Run) -> Result:
    return train(run, *_shared)


class Workers:
    """Processes that train runs on one data set under one protocol."""

    def __init__(self, protocol: Protocol, dataset: Dataset, processes: int = 2) -> None:
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
        """Train every run, small batches first, and return results in the order of `runs`; `finished` sees each at its end."""
        futures = {self._pool.submit(_train, run): run for run in sorted(runs, key=lambda run: run.batch)}
        results: dict[Run, Result] = {}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            finished(results[futures[future]])
        return [results[run] for run in runs]
