"""SGD and LARS at growing batches, on handwritten digits. Run from the repository root: `nox -s demo`.

The protocol. Four methods: SGD and LARS, each once with one lr for all tensors and once with an lr of 0.1 for the
biases, so that the second knob is tried for both optimizers. The same for all of them: network, epochs, linear warm-up
and polynomial decay, momentum, weight decay (weights only; biases are neither decayed nor, in LARS, adapted; there are
no norm layers), and for each seed the initial weights and the order of the images. The lr is chosen on a validation
split from a grid with factor 2, which moves until its best lies inside and is then refined by half a step; at each
batch every method gets the same number of trials. Then fresh seeds, with other seeds than the search had, are trained
at that lr, and only they are measured, once, on the test split. Every run is in the CSV.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from .data import DataError, Dataset, idx_digits, scikit_learn_digits
from .figure import draw
from .progress import show
from .report import Study, describe, drawn_from, read_csv, terminal_table, write_csv, write_markdown
from .search import search
from .training import METHODS, Protocol, Run
from .workers import Workers

QUICK = Protocol(epochs=3, warmup_epochs=1, first_trials=3, most_trials=3, search_seeds=(100,), test_seeds=(0, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        dataset = idx_digits(options.data) if options.data else scikit_learn_digits()
        if options.quick:
            dataset = replace(dataset, batches=dataset.batches[-2:])
        study(dataset, QUICK if options.quick else Protocol(), options, console)
    except DataError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(f"--out {options.out}: must be a directory that can be written, found: {error.strerror}", 2)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written", 130)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Train a small convolutional network with SGD and with LARS at growing batches: about two minutes "
        "on two cores for the digits inside scikit-learn.",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="MNIST-format files (idx, gzipped or not); about a quarter of an hour"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("results/demo"),
        help="where the files go (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; no result")
    parser.add_argument(
        "--workers", type=int, metavar="N", default=2, help="processes of one thread each (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers must be >= 1, got {options.workers}")
    return options


def fail(message: str, status: int) -> int:
    print(f"demo: {message}", file=sys.stderr)
    return status


def study(dataset: Dataset, protocol: Protocol, options: argparse.Namespace, console: Console) -> None:
    """Search, test, write: in this order, so that the test split cannot enter a choice."""
    started = time.perf_counter()
    for sentence in describe(dataset, protocol):
        console.print(sentence, highlight=False, markup=False)

    with Workers(options.workers, protocol, dataset) as workers:
        grids = search(METHODS, dataset.batches, protocol, lambda runs: show("search", runs, workers, console))
        runs = [
            Run(method, batch, grid.best_lr, seed, final=True)
            for (batch, method), grid in grids.items()
            for seed in protocol.test_seeds
        ]
        results = show("test", runs, workers, console)
    finals = {key: [r for r in results if (r.run.batch, r.run.method) == key] for key in grids}

    outcome = Study(dataset, protocol, METHODS, grids, finals, options.quick)
    console.print(terminal_table(outcome))
    write_csv(outcome, options.out / "runs.csv")
    draw(outcome, options.out / "demo.png", drawn_from(read_csv(options.out / "runs.csv")))
    write_markdown(outcome, options.out / "table.md", time.perf_counter() - started)
    console.print(
        f"{time.perf_counter() - started:.0f} s. Written: demo.png, runs.csv, table.md in {options.out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
