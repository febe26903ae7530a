"""README's measured parts, from what is stored: how long a step takes, and what came out of the demo."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from .optimizers import CONTENDERS, YARDSTICK
from .promises import DEFAULT, PROMISES
from .results import COPY, FLOOR, TWO_PASSES, Results, find
from .tables import markdown, number, title


def speed(all_results: list[Results], elsewhere: list[Results]) -> Iterator[str]:
    """The default beside the other LARSes, and how many of the promises the run kept."""
    results = find(all_results, "step_time", "cpu")
    if results is None:
        yield "Not measured. `python -m nox -s bench` measures it.\n"
        return
    known = dict.fromkeys(row.contender for row in results.rows)
    contenders = [DEFAULT, *(name for name in known if name in CONTENDERS and CONTENDERS[name].package)]
    yield f"A step on a CPU, times the time of {title(YARDSTICK)} (median of the rounds):\n"
    rows = [
        [
            case,
            number(with_a_read(results, case)),
            *(number(results.ratio(case, name, YARDSTICK)) for name in contenders),
        ]
        for case in results.cases
    ]
    header = ["", "SGD and one more read", *map(title, contenders)]
    yield from markdown(header, rows, numbers=set(range(1, len(header))))
    machine = results.machine
    kept = [promise.kept(value) for promise in PROMISES["cpu"] if (value := promise.measured(results)) is not None]
    yield (
        f"Bytes alone, {TWO_PASSES} against {FLOOR}, make it {TWO_PASSES / FLOOR:.2f}. The first column adds the time in which "
        "this machine, in the same rounds, reads parameters and gradients once more.\n"
        f"Measured on {machine['cpu']}, "
        f"{machine['cores']} cores, torch {machine['versions']['torch'].split('+')[0]}, {machine['date']}, load average "
        f"at the start {machine['load']}."
    )
    yield (
        f"Of the {len(kept)} bounds that fastlars sets itself this run kept {sum(kept)}: "
        "[which ones, and all else that was measured](docs/performance.md)."
    )
    for other in elsewhere:
        if other.machine["device"] == "cpu":
            yield _other_host(other, results)
    if find(all_results, "step_time", "cuda") is None:
        yield "Nothing has been measured on a GPU."
    yield ""


def _other_host(other: Results, results: Results) -> str:
    case = results.cases[0]
    copies = [number(row.gb_s, ".0f") for run in (other, results) if (row := run.find(case, COPY)) is not None]
    ratios = (f"{number(other.ratio(case, DEFAULT, YARDSTICK))} on {case}" for case in other.cases)
    a_read = number(with_a_read(other, case))
    return (
        f"On another host, which copies {' GB/s instead of '.join(copies)}, it took {', '.join(ratios)}"
        + (f"; SGD and one more read took {a_read} on {case}" if a_read else "")
        + "."
    )


def with_a_read(results: Results, case: str) -> float | None:
    """What fused SGD and one more read take, in units of fused SGD."""
    row = results.and_a_read(case, YARDSTICK)
    return None if row is None else results.relative(row, YARDSTICK)


def demo(runs: Sequence[dict[str, str]]) -> Iterator[str]:
    """Test accuracy by batch and method, from the rows of docs/demo/runs.csv."""
    final = [run for run in runs if run["phase"] == "final"]
    batches = list(dict.fromkeys(run["batch"] for run in final))
    methods = list(dict.fromkeys((run["optimizer"], run["bias_lr"]) for run in final))
    seeds = len({run["seed"] for run in final})
    yield f"Test accuracy in %, mean of {seeds} seeds, {final[0]['epochs']} epochs; the last batch is the whole training set:\n"
    header = ["batch", *(name if lr == "same" else f"{name}, biases at lr {lr}" for name, lr in methods)]
    rows = [
        [batch, *(f"{statistics.mean(accuracies(final, batch, *method)):.1f}" for method in methods)]
        for batch in batches
    ]
    yield from markdown(header, rows, numbers=set(range(len(header))))


def accuracies(runs: Sequence[dict[str, str]], batch: str, optimizer: str, bias_lr: str) -> list[float]:
    """Of one method at one batch, a number a run."""
    asked = (batch, optimizer, bias_lr)
    return [float(run["accuracy_percent"]) for run in runs if (run["batch"], run["optimizer"], run["bias_lr"]) == asked]
