"""Train with SGD and LARS at growing batches, on handwritten digits. `nox -s demo` runs it.

It compares LARS with a separate lr for the biases, which is how LARS is meant to be used, SGD with the better of both ways to
set the biases' lr, and LARS with one lr for all tensors. Everything else is the same. A seed sets the initial weights and the
order of the images. Learning rates are the best of a stored search on a validation split (lrs.csv), which `--search` repeats.
The runs use other seeds than the search, and only they are measured on the test split.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

from . import outcome
from .data import Dataset, scikit_learn_digits
from .figure import draw
from .search import search
from .training import METHODS, Protocol, Result, Run, train_all

STORED = Path(__file__).with_name("lrs.csv")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--search", action="store_true", help="search the learning rates again: minutes")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("results/demo"), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        demo(scikit_learn_digits(), Protocol(), options.out, Console(highlight=False), searching=options.search)
    except OSError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "demo: interrupted\n")
    return 0


def demo(dataset: Dataset, protocol: Protocol, out: Path, console: Console, *, searching: bool) -> None:
    """Search if asked, train, and write lrs.csv (after a search), runs.csv and demo.png."""
    began = time.perf_counter()
    found = outcome.read(STORED)
    if searching:

        def train(runs: list[Run]) -> list[Result]:
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task(f"search: {len(runs)} runs", total=len(runs))
                return train_all(runs, protocol, dataset, lambda _: progress.advance(task))

        found = outcome.trials(search(METHODS, dataset.batches, protocol, train))
        outcome.write(found, out / "lrs.csv")
    names = {
        Run(method, batch, lr, seed, final=True): name
        for (name, batch), (method, lr) in outcome.chosen(found, dataset.batches).items()
        for seed in protocol.test_seeds
    }
    ended: list[Result] = []
    with Live(console=console, transient=True) as live:

        def show(result: Result) -> None:
            ended.append(result)
            live.update(_table(dataset, ended, names))

        results = train_all(list(names), protocol, dataset, show)
    rows = outcome.finals([(names[result.run], result) for result in results], protocol)
    console.print(_table(dataset, ended, names))
    outcome.write(rows, out / "runs.csv")
    draw(rows, dataset.name, out / "demo.png")
    console.print(outcome.one_lr(rows), soft_wrap=True)
    console.print(f"{time.perf_counter() - began:.0f} s; runs and picture are in {out}", markup=False, soft_wrap=True)


def _table(dataset: Dataset, results: list[Result], names: dict[Run, str]) -> Table:
    """One row per method, one column per batch: the mean of the finished seeds."""
    title, done = f"{dataset.name}: test accuracy in %", f"means of the seeds, {len(results)} of {len(names)} runs"
    table = Table(box=box.SIMPLE, title=title, caption=done, min_width=70)
    table.add_column("batch")
    for batch in dataset.batches:
        table.add_column(str(batch), justify="right")
    for name, words in outcome.TITLES.items():
        ended = [
            [result.accuracy for result in results if (names[result.run], result.run.batch) == (name, batch)]
            for batch in dataset.batches
        ]
        table.add_row(words, *(f"{statistics.fmean(of_batch):.1f}" if of_batch else "" for of_batch in ended))
    return table


if __name__ == "__main__":
    sys.exit(main())
