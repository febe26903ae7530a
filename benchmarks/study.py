"""Accuracy against batch and lr, for SGD, SGD with Nesterov and with clipping, AdamW and LARS. `nox -s study` runs it.

docs/study.md describes the runs and their results. benchmarks/results/study.csv holds every run.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from fastlars import DIALECTS

from .demo.data import FILES, Cut, DataError, idx_digits
from .demo.search import Grid, search
from .demo.training import Method, Protocol, Result, Run, train_all
from .results import FOLDER, table

# The training split is 32768 of MNIST's 60000 training images, in batches of 256, 1024, 4096 or 8192. Images are halved to
# 14 x 14 pixels.
CUT = Cut(train=32768, validation=10000, share=0.8, parts=(128, 32, 8, 4), pool=2)
PROTOCOL = Protocol(
    *(5, 1),  # epochs, and the warm-up epochs among them
    neighbours=2,
    search_seeds=(100, 101, 102),
    test_seeds=(0, 1, 2, 3, 4),
    first_stride=2,
)
BATCHES = tuple(CUT.train // part for part in CUT.parts)
LARGEST = BATCHES[-1]
OWN_LR = {"SGD": 0.1, "LARS": 0.1, "AdamW": 0.001}  # the customary lr of biases and norms, not searched
SETTINGS = (
    *("split", "images", "optimizer", "options", "clip", "bias_lr", "adapt_all", "batch_norm", "batch", "lr", "seed"),
    *("epochs", "warmup_epochs", "momentum", "weight_decay"),
)
OUTCOME = ("accuracy_percent", "loss", "seconds")


def _dialect(name: str, first_lr: float) -> Method:
    options = {option: value for option, value in DIALECTS[name].items() if option != "adapt"}  # groups set it
    return replace(MAIN["LARS"], options=tuple(sorted(options.items())), first_lr=first_lr)


# first_lr comes from a pilot of single runs. A grid that begins elsewhere only needs more trials.
BASE = {
    "SGD": Method("SGD", None, 0.2),
    "SGD with Nesterov": Method("SGD", None, 0.2, (("nesterov", True),)),
    "SGD with clipping": Method("SGD", None, 1.6, clip=1.0, first_lr_power=0.5),
    "AdamW": Method("AdamW", None, 0.032, first_lr_power=0.25),
    "LARS": Method("LARS", None, 128.0, first_lr_power=0.6),
}
MAIN = {name: replace(method, bias_lr=OWN_LR[method.optimizer]) for name, method in BASE.items()}
ONE_LR = {
    f"{name}, one lr for all": replace(method, first_lr={"AdamW": 0.064, "LARS": 16.0}.get(name, method.first_lr))
    for name, method in BASE.items()
}
# The dialects paper and mlperf share a row, because they differ only in eps, which is far below any norm here. bolts is LARS
# itself.
FAMILY = {
    **{f"dialect {name}": _dialect(name, lr) for name, lr in (("larc", 16.0), ("timm_larc", 32.0), ("byol", 128.0))},
    "dialect simclr": _dialect("simclr", 128.0),
    "dialect paper and mlperf": _dialect("paper", 128.0),
    "all tensors adapted": replace(BASE["LARS"], adapt_all=True, first_lr=64.0),
}
BATCH_NORM = {name: replace(method, batch_norm=True) for name, method in MAIN.items()}
for _name, _lr in (("SGD with clipping", 0.8), ("LARS", 32.0)):
    BATCH_NORM[_name] = replace(BATCH_NORM[_name], first_lr=_lr)


@dataclass(frozen=True)
class Study:
    """Results by batch and method. Trials of the grids use the validation split, finals the test split."""

    grids: dict[tuple[int, Method], Grid]
    finals: dict[tuple[int, Method], list[Result]]  # none if the best lr is on the edge of the largest grid


def study(train: Callable[[list[Run]], list[Result]]) -> Study:
    """Search, then test. No search sees the test split."""
    found = Study({}, defaultdict(list))
    tables: list[tuple[dict[str, Method], tuple[int, ...]]] = [
        ({**MAIN, **FAMILY, **ONE_LR}, (LARGEST,)),
        (MAIN, BATCHES[:-1]),
        (BATCH_NORM, (LARGEST,)),
    ]
    for rows, batches in tables:
        grids = search(list(rows.values()), batches, PROTOCOL, train)
        keys = [key for key, grid in grids.items() if grid.is_inside]
        seeds = PROTOCOL.test_seeds
        runs = [Run(m, batch, grids[batch, m].best_lr, seed, final=True) for batch, m in keys for seed in seeds]
        results = iter(train(runs))
        found.grids.update(grids)
        found.finals.update({key: [next(results) for _ in seeds] for key in keys})
    return found


def key(run: Run) -> dict[str, str]:
    """The settings of a run, as they are written to a line of the CSV."""
    method = run.method
    values = (
        *(("test", 10000) if run.final else ("validation", CUT.validation)),
        *(method.optimizer, json.dumps(dict(method.options)), method.clip, method.bias_lr),
        *(int(method.adapt_all), int(method.batch_norm), run.batch, run.lr, run.seed),
        *(PROTOCOL.epochs, PROTOCOL.warmup_epochs, PROTOCOL.momentum, PROTOCOL.weight_decay),
    )
    return {name: "" if value is None else str(value) for name, value in zip(SETTINGS, values, strict=True)}


def stored(path: Path = FOLDER / "study.csv") -> dict[tuple[str, ...], list[float]]:
    """Accuracy, loss and seconds of the runs of a CSV, by their settings."""
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    return {tuple(row[name] for name in SETTINGS): [float(row[name]) for name in OUTCOME] for row in rows}


def again(runs: Sequence[Run]) -> list[Result]:
    """The stored results of these runs."""
    rows = stored()
    return [Result(run, *rows[tuple(key(run).values())]) for run in runs]


def train(data: Path, out: Path) -> Study:
    """Train everything. Each run is a line of the CSV, which is written when the run ends."""
    dataset = idx_digits(data, CUT)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*SETTINGS, *OUTCOME], lineterminator="\n")
        writer.writeheader()

        def add(result: Result) -> None:
            outcome = (result.accuracy, result.loss, round(result.seconds, 2))
            writer.writerow(key(result.run) | dict(zip(OUTCOME, outcome, strict=True)))
            file.flush()

        return study(lambda runs: train_all(runs, PROTOCOL, dataset, add))


# number of paired seeds -> Student's t for a two-sided interval of 95 %
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def difference(ours: Sequence[Result], theirs: Sequence[Result]) -> str:
    """Our test accuracy minus theirs in points, as the mean over paired seeds ± half of its 95 % interval, and a verdict."""
    if not ours or not theirs:
        return "failed"
    gaps = [a.accuracy - b.accuracy for a, b in zip(ours, theirs, strict=True) if a.run.seed == b.run.seed]
    mean, half = statistics.mean(gaps), T[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{mean:+.1f} ± {half:.1f}" + (", tie" if abs(mean) <= half else ", worse" if mean < 0 else "")


def plateau(grid: Grid, within: float = 1.0) -> str:
    """The width of the lr plateau, as the factor between its ends.

    The plateau is the unbroken range of tried lrs around the best one that reach its accuracy up to `within` points.
    """
    ks, best = sorted(grid.trials), grid.score(grid.best)[0]

    def is_good(k: int) -> bool:
        return grid.score(k)[0] >= best - within

    high = [*takewhile(is_good, ks[ks.index(grid.best) :])][-1]
    low = [*takewhile(is_good, ks[ks.index(grid.best) :: -1])][-1]
    edge = "at least " if low == ks[0] or high == ks[-1] else ""
    return f"{edge}{grid.lr(high) / grid.lr(low):.2g}"


def cells(found: Study, batch: int, method: Method) -> list[str]:
    """The cells of a table row: number of trials, lr, plateau, validation accuracy, test accuracy and its range."""
    grid, finals = found.grids[batch, method], [result.accuracy for result in found.finals.get((batch, method), [])]
    searched = [str(len(grid.trials)), f"{grid.best_lr:.3g}", plateau(grid), f"{grid.score(grid.best)[0]:.1f}"]
    if not finals:
        return [*searched, "failed: on the edge", ""]
    return [*searched, f"{statistics.mean(finals):.1f}", f"{min(finals):.1f} to {max(finals):.1f}"]


def rival(found: Study, batch: int, name: str) -> tuple[Method, str]:
    """The variant of a method with which LARS is compared. At the largest batch it is the better one on validation."""
    own, one = MAIN[name], ONE_LR[f"{name}, one lr for all"]
    both = [method for method in (own, one) if found.finals.get((batch, method))]
    best = max(both, default=own, key=lambda m: found.grids[batch, m].score(found.grids[batch, m].best))
    return best, " (one lr)" if best is one else ""


def tables(found: Study) -> Iterator[str]:
    """The measured part of docs/study.md."""
    others = [name for name in MAIN if name != "LARS"]
    rows = []
    for name in others:
        row = []
        for batch in BATCHES:
            method, remark = rival(found, batch, name)
            row.append(difference(found.finals[batch, MAIN["LARS"]], found.finals[batch, method]) + remark)
        pair = (found.finals[LARGEST, BATCH_NORM[which]] for which in ("LARS", name))
        rows.append([name, *row, difference(*pair)])
    yield "LARS minus the other method, in points of test accuracy; no remark means better:\n"
    yield from table(["method", *(f"batch {batch}" for batch in BATCHES), f"{LARGEST}, batch-norm"], rows)
    yield "The lr plateau, as the factor between its ends:\n"
    at = [(BATCHES[0], 1.0), (LARGEST, 1.0), (LARGEST, 5.0)]
    header = ["method", *(f"batch {batch}, within {within:g} of the best" for batch, within in at)]
    yield from table(header, [[n, *(plateau(found.grids[b, m], w) for b, w in at)] for n, m in MAIN.items()])
    columns = ["trials", "lr", "plateau", "valid.", "test", "lowest to highest"]
    yield "Table 1: every batch, own lr for the biases.\n"
    rows = [[name, str(batch), *cells(found, batch, method)] for batch in BATCHES for name, method in MAIN.items()]
    yield from table(["method", "batch", *columns], rows)
    yield f"Table 2: the rest of LARS's family at batch {LARGEST}, and one lr for all tensors.\n"
    ours = found.finals[LARGEST, MAIN["LARS"]]
    rest = {**FAMILY, **ONE_LR}.items()
    rows = [[n, *cells(found, LARGEST, m), difference(ours, found.finals[LARGEST, m])] for n, m in rest]
    yield from table(["method", *columns, "LARS minus it"], rows)
    yield f"Table 3: batch {LARGEST}, with batch-norm.\n"
    yield from table(["method", *columns], [[n, *cells(found, LARGEST, m)] for n, m in BATCH_NORM.items()])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    files = ", ".join(name for pair in FILES.values() for name in pair)
    parser.add_argument("--data", type=Path, metavar="FOLDER", required=True, help=f"{files}, gzipped or not")
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path("study.csv"), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        print(*tables(train(options.data, options.out)), sep="\n")
    except DataError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
