"""Write what is measured into README and docs, from what is stored: no such figure is typed by hand.

From benchmarks/results/*.json all of docs/performance.md, its pictures, and parts of README.md and docs/distributed.md; from
docs/demo/runs.csv a part of README.md. Files of `benchmarks.step_time` in benchmarks/results/elsewhere are runs on other hosts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import figure, readme
from .commandline import FOLDER
from .demo.report import read_csv
from .distributed import COPIED, EXCHANGE, SHARDED
from .machine import sentence
from .optimizers import YARDSTICK
from .promises import PROMISES
from .results import ELSEWHERE, Results, find, load_all
from .tables import (
    STEP_COLUMNS,
    STEP_NOTE,
    TRAINING_COLUMNS,
    TRAINING_NOTE,
    Column,
    filled,
    heading,
    markdown,
    number,
    rows_of,
    title,
)

DOCS = FOLDER.parents[1] / "docs"
INTRODUCTION = """\
<!-- Written by `python -m benchmarks.render` from benchmarks/results; edit that. -->

# Performance

Times are given against torch's fused SGD, which moves 20 bytes a float32 parameter. LARS's floors are 28, 1.4 times as many,
and 20 where its second read comes from a cache: [Why it is fast](bytes.md). Bytes are not time: where reading alone is slower
than SGD's mix of reads and writes, a second read takes more than its share. So each table has a row for fused SGD and one more
read of parameters and gradients, as fast as this machine reads in the same round; below it, part of the read came from a cache.

All optimizers step the same tensors. They are interleaved: in each round everyone makes one step, in a new order, together
with a copy of 256 MiB that measures the bandwidth; ms are medians, ratios are medians of the ratios within a round. On a CPU
the caches hold what the one before left; on a GPU the L2 cache is flushed before each step, and the device pauses there until
the host is ahead of it, as it is in training. All use momentum and weight decay, and each LARS adapts every tensor
(pytorch_optimizer's leaves vectors out). The quadra loop is a minimal loop of ours that stands for the LARS of Lightning
Bolts, quadra and lightly, in whose manner Python reads two norms a tensor. A share of the copy above 100 % is possible: a copy
also fetches the memory that it is about to overwrite, and caches help. On a virtual machine, ratios depend on where its cores
are: with a cache in common, norms cost less and small tensors more than with one each, and every core then has more bandwidth
for itself, which favours whoever reads once.
"""
COMMANDS = """\
## Measure it yourself

    python -m nox -s bench                   # CPU: all of it, then this page
    python -m nox -s bench -- --device cuda  # the same on an NVIDIA GPU
    python -m nox -s bench_compare -- before.json after.json --margin 10

One part, some models, some optimizers: `python -m benchmarks.step_time --help`. Cold compilation:
`python -m benchmarks.compile_time`.
"""
# around each part of a page that is otherwise written by hand
BEGIN, END = "<!-- measured: {}; written by `python -m benchmarks.render` -->", "<!-- end of what was measured: {} -->"
DISTRIBUTED_NOTE = """\
The optimizer's step alone, processes with gloo and one thread each, on {cores} cores: more ranks than cores share them, so that
a step then takes longer for everyone, and says nothing of a machine that has a core or GPU for each. Copied: each rank steps the
whole model, as under DDP. Sharded: each steps its part, as under FSDP2. Times of the slowest rank in each round, from when all are
there; the exchange is that of the rank that comes last to it and waits for nobody. Medians over the rounds. On one rank a sharded
step is the slower: it measures all tensors before it updates any, a copied one on CPU each while it is in the cache.\
"""
COMPILE_NOTE = """\
Seconds until a compiled `optimizer.step` has come to rest: the first two steps, in a fresh process with empty caches (torch's SGD
makes its momentum buffers in the first and compiles again for the second). torch {torch}; medians. The fused steps are not in the
graph; foreach is, as C++ code.\
"""
ELSEWHERE_NOTE = """\
The same benchmark, some of its optimizers, on other hosts: how a second read compares with SGD depends on the memory, and how small
tensors do on the speed of one core.\
"""
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="DIR", help="(default: benchmarks/results)")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="(default: docs)")
    options = parser.parse_args(arguments)
    try:
        all_results, elsewhere = load_all(options.results), load_all(options.results / ELSEWHERE)
    except ValueError as error:
        print(f"render: {error}", file=sys.stderr)
        return 2
    options.docs.mkdir(parents=True, exist_ok=True)
    for path, text in pages(all_results, elsewhere, options.docs).items():
        path.write_text(text, encoding="utf-8")
    for device in DEVICES:
        if (step_time := find(all_results, "step_time", device)) is not None:
            figure.draw(step_time, find(all_results, "scaling", device), options.docs / _picture(device))
    return 0


def pages(all_results: list[Results], elsewhere: list[Results], docs: Path) -> dict[Path, str]:
    """The pages with measured parts, as they have to be; of those written by hand only what exists."""
    sections = ["\n".join(section(all_results, elsewhere, device)) for device in DEVICES]
    written = {docs / "performance.md": "\n".join([INTRODUCTION, *sections, COMMANDS])}
    page, runs = docs.parent / "README.md", docs / "demo" / "runs.csv"
    if page.exists():
        text = _with_part(page, page.read_text(encoding="utf-8"), "speed", readme.speed(all_results, elsewhere))
        written[page] = _with_part(page, text, "demo", readme.demo(read_csv(runs)))
    page, measured = docs / "distributed.md", find(all_results, "distributed", "cpu")
    if page.exists() and measured is not None:
        written[page] = _with_part(page, page.read_text(encoding="utf-8"), "ranks", _ranks(measured))
    return written


def _with_part(page: Path, text: str, name: str, lines: Iterator[str]) -> str:
    """The page with these lines between its two comments; the rest is written by hand."""
    head, begin, rest = text.partition(BEGIN.format(name))
    _, end, tail = rest.partition(END.format(name))
    if not begin or not end:
        raise SystemExit(f"render: {page} must hold the lines {BEGIN.format(name)!r} and {END.format(name)!r}")
    return "\n".join([f"{head}{begin}\n", *lines, f"{end}{tail}"])


def _picture(device: str) -> str:
    return f"performance-{device}.svg"


def _ranks(results: Results) -> Iterator[str]:
    """The step against ranks, medians over the rounds; the exchange apart."""
    yield f"Measured on {sentence(results.machine)}\n"
    yield DISTRIBUTED_NOTE.format(cores=results.machine["cores"]) + "\n"
    rows = []
    for case in results.cases:
        copied, sharded, exchange = (results.find(case, name) for name in (COPIED, SHARDED, EXCHANGE))
        assert copied is not None
        assert sharded is not None
        apart = ["none", "0"] if exchange is None else [f"{exchange.median:.2g}", f"{exchange.bytes_moved}"]
        rows.append([case, f"{copied.median:.3g}", f"{sharded.median:.3g}", *apart, str(len(copied.ms))])
    header = ["", "copied, ms", "sharded, ms", "of that the exchange, ms", "bytes exchanged", "rounds"]
    yield from markdown(header, rows, numbers={1, 2, 3, 4, 5})


def section(all_results: list[Results], elsewhere: list[Results], device: str) -> Iterator[str]:
    """One device: the figure, then everything in numbers; what other hosts measured comes last."""
    yield f"## {DEVICES[device]}\n"
    step_time, scaling, training, compiling = (
        find(all_results, name, device) for name in ("step_time", "scaling", "training_step", "compile_time")
    )
    if step_time is None:
        yield f"Not measured. `{_command(device)}` measures it.\n"
        return
    yield f"![{figure.alt_text(step_time, scaling)}]({_picture(device)})\n"
    yield f"Measured on {sentence(step_time.machine)}\n"
    yield from _promises(step_time, device)
    yield "### The step alone\n"
    yield STEP_NOTE.replace("*", r"\*") + "\n"
    yield from _skipped(step_time)
    for case in step_time.cases:
        yield from _case_table(step_time, case, STEP_COLUMNS)
    for name, results in (("Cost against size", scaling), ("The whole training step", training)):
        yield f"### {name}\n"
        if results is None:
            yield f"Not measured. `{_command(device)}` measures it.\n"
        elif results is scaling:
            yield from _scaling_table(results)
        else:
            yield f"{TRAINING_NOTE}\n"
            for case in results.cases:
                yield from _case_table(results, case, TRAINING_COLUMNS)
    if compiling is not None:
        yield "### Cold `torch.compile`\n"
        yield from _compile_table(compiling)
    others = [results for results in elsewhere if results.machine["device"] == device]
    if others:
        yield "### On other hosts\n"
        yield ELSEWHERE_NOTE + "\n"
    for results in others:
        yield f"Measured on {sentence(results.machine)}\n"
        yield from _promises(results, device)
        for case in results.cases:
            yield from _case_table(results, case, STEP_COLUMNS)


def _compile_table(results: Results) -> Iterator[str]:
    yield COMPILE_NOTE.format(torch=results.machine["versions"]["torch"]) + "\n"
    rows = []
    for case in results.cases:
        for row in results.of_case(case):
            beside = "sgd-" + row.contender.partition("-")[2]
            ratio = results.ratio(case, row.contender, beside)
            assert ratio is not None
            rows.append([case, title(row.contender), f"{row.median / 1e3:.3g}", f"{ratio:.2f}", str(len(row.ms))])
    header = ["", "", "seconds", "times torch's SGD, same implementation", "samples"]
    yield from markdown(header, rows, numbers={2, 3, 4})


def _command(device: str) -> str:
    return "python -m nox -s bench" + ("" if device == "cpu" else f" -- --device {device}")


def _promises(results: Results, device: str) -> Iterator[str]:
    values = [(promise, promise.measured(results)) for promise in PROMISES[device]]
    if all(value is None for _, value in values):
        return
    what = {"cpu": "its default on a CPU", "cuda": "fused=True on a data-centre GPU"}[device]
    yield f"What fastlars promises of {what}, and what this run measured:\n"
    rows = []
    for promise, value in values:
        kept = "not measured" if value is None else "kept" if promise.kept(value) else "not kept"
        rows.append([promise.case, title(promise.against), promise.bound, number(value, promise.form), kept])
    yield from markdown(["model", "against", "promised", "measured", ""], rows, numbers={3})


def _skipped(results: Results) -> Iterator[str]:
    for name, reason in results.skipped.items():
        yield f"{title(name)} was skipped: {reason}.\n"


def _case_table(results: Results, case: str, columns: tuple[Column, ...]) -> Iterator[str]:
    texts = filled(results, rows_of(results, case), columns)
    yield f"**{heading(results, case)}**\n"
    rows = [list(row) for row in zip(*(column for _, column in texts), strict=True)]
    yield from markdown([header for header, _ in texts], rows, numbers=set(range(1, len(texts))))


def _scaling_table(results: Results) -> Iterator[str]:
    contenders = list(dict.fromkeys(row.contender for case in results.cases for row in results.of_case(case)))
    yield f"Milliseconds, and times the time of {title(YARDSTICK)}.\n"
    rows = []
    for case in results.cases:
        found = {row.contender: row for row in results.of_case(case)}
        first = next(iter(found.values()))
        cells = [f"{first.tensors:,}", f"{first.elements:,}"]
        for contender in contenders:
            ratio = results.ratio(case, contender, YARDSTICK)
            cells.append(f"{found[contender].median:.3g}" + ("" if ratio is None else f" ({ratio:.2f})"))
        rows.append(cells)
    header = ["tensors", "parameters", *(title(contender) for contender in contenders)]
    yield from markdown(header, rows, numbers=set(range(len(header))))


if __name__ == "__main__":
    sys.exit(main())
