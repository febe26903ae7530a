"""Runs under a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .training import Result, Run
from .workers import Workers


def show(
    phase: str,
    runs: list[Run],
    workers: Workers,
    console: Console,
    finished: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Train the runs under a progress bar; where there is no terminal, under a line when they are done.

    Args:
        phase: What they are for, in a word.
        runs: What to train.
        workers: The processes that do it.
        console: Where the bar goes.
        finished: Called with each result, before the bar moves on.
    """
    started = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{phase}: {len(runs)} runs", total=len(runs))

        def advance(result: Result) -> None:
            if finished is not None:
                finished(result)
            progress.advance(task)

        results = workers.train(runs, finished=advance)
    console.print(f"{phase}: {len(runs)} runs in {time.perf_counter() - started:.0f} s", highlight=False)
    return results
