"""Accuracy against batch and lr, for SGD, SGD with Nesterov and with clipping, AdamW and LARS: `nox -s study`.

docs/study.md says what is run, and what came out. Every run is written to a CSV when it ends; a study that was stopped, or
killed, goes on from there when it is started again.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.commandline import FOLDER
from benchmarks.demo.data import FILES, DataError, Dataset, idx_digits
from benchmarks.demo.progress import show
from benchmarks.demo.training import Result, Run
from benchmarks.demo.workers import Workers

from . import page
from .methods import CUT, PROTOCOLS, batches
from .outcome import study
from .store import Store, StoreError

COMMITTED = FOLDER / "study.csv"
DOCS = FOLDER.parents[1] / "docs"
WHERE = """\
the study needs MNIST-format files, which are not part of this repository. Put these four into a folder, gzipped (.gz) or not:
  {files}
MNIST has them at https://yann.lecun.com/exdb/mnist and its many mirrors, Fashion-MNIST and KMNIST come in the same form. Then:
  python -m nox -s study -- --data FOLDER"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    try:
        if options.render:
            page.write(Store.recorded(COMMITTED), DOCS, page.CONCLUSION)
            return 0
        if options.data is None:
            return fail(WHERE.format(files="\n  ".join(FILES.values())), 2)
        dataset = idx_digits(options.data, CUT)
        train(dataset, digest(options.data), options, console)
    except (DataError, StoreError) as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(f"--out {options.out}: must be a folder that can be written, found: {error.strerror}", 2)
    except KeyboardInterrupt:
        return fail("interrupted; runs that had ended are stored: start it again to go on", 130)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="MNIST-format files (idx, gzipped or not)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        default=Path("results/study"),
        help="where study.csv is kept, and the page and pictures go (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="a few short runs, to see that it runs; no result")
    parser.add_argument("--workers", type=int, metavar="N", default=2, help="processes of one thread each (default: 2)")
    parser.add_argument(
        "--render", action="store_true", help="write docs/study.md and its pictures from benchmarks/results/study.csv"
    )
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers must be >= 1, got {options.workers}")
    return options


def fail(message: str, status: int) -> int:
    print(f"study: {message}", file=sys.stderr)
    return status


def digest(directory: Path) -> str:
    """Of the files' bytes as they lie there: another copy of the same data, gzipped otherwise, counts as other data."""
    paths = [path for name in FILES.values() for path in (directory / name, directory / f"{name}.gz") if path.exists()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def train(dataset: Dataset, data_digest: str, options: argparse.Namespace, console: Console) -> None:
    """Train what the store lacks, then write page and pictures beside it."""
    version = "quick" if options.quick else "1"
    protocol = PROTOCOLS[version]
    origin = {
        "protocol": version,
        "data": f"{dataset.name.partition(' ')[0]} {data_digest}",
        "train_images": str(len(dataset.train.labels)),
        "torch": torch.__version__,
    }
    sizes = (len(dataset.validation.labels), len(dataset.test.labels))
    store = Store(options.out / "study.csv", protocol, origin, sizes)
    console.print(f"{store.path}: {len(store)} runs are there", highlight=False, markup=False, soft_wrap=True)
    started = time.perf_counter()
    with Workers(options.workers, protocol, dataset) as workers:

        def stored(what: str, runs: list[Run]) -> list[Result]:
            missing = [run for run in dict.fromkeys(runs) if run not in store]
            if missing:
                show(what, missing, workers, console, finished=store.add)
            return store.results(runs)

        study(protocol, batches(protocol, len(dataset.train.labels)), stored)
    written = page.write(Store.recorded(store.path), options.out)
    console.print(f"{time.perf_counter() - started:.0f} s. Written: {written}", highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
