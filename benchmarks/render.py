"""Write what is measured into README and docs, from what is stored: no such figure is typed by hand.

From benchmarks/results/*.json come docs/performance.md with its pictures and a part of README.md; from docs/demo/runs.csv another
part of README.md. Files in benchmarks/results/elsewhere are runs of step_time on other hosts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from .demo import outcome
from .machine import sentence
from .optimizers import CONTENDERS, LOOP, YARDSTICK, title
from .rounds import COPY, FLOOR, READ, TWO_PASSES, Results, Row, fingerprint, load
from .shapes import MODELS

ROOT = Path(__file__).parents[1]
FOLDER, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
DEFAULT = "fastlars-fused"  # what a CPU user gets, and with fused=True a GPU user
REAL = ", weights adapted"  # how a case ends in which LARS leaves biases and norms alone, as users have it
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
BEGIN, END = "<!-- measured: {}; written by `python -m benchmarks.render` -->", "<!-- end of what was measured: {} -->"
INTRODUCTION = """\
<!-- Written by `python -m benchmarks.render` from benchmarks/results; edit that. -->

# Performance

All times are compared with torch's fused SGD, which moves 20 bytes per float32 parameter. LARS needs one more read of parameters
and gradients for the norms: 28 bytes, 1.4 times as many, or 20 where a cache serves the second read ([why it is fast](bytes.md)).
The extra read can cost more than 40 % on machines whose reads are slow, so each table has a row for fused SGD plus one more read at
the speed this machine read at in the same round. A result below that row got part of the read from a cache.

Contenders are interleaved: in each round everyone makes one step on the same tensors, in a new order, next to a 256 MiB copy that
measures the bandwidth. Milliseconds are medians; ratios are medians of the ratios within a round. On a CPU, caches hold what the
previous contender left. On a GPU, the L2 cache is flushed before each step and the device waits until the host is ahead of it, as it
is in training. Everyone uses momentum and weight decay. In a case marked "weights adapted", biases and norms are neither adapted nor
decayed, as `param_groups` makes it; in the others each LARS adapts every tensor (pytorch_optimizer's leaves vectors out). The quadra
loop is a minimal loop of ours in the manner of Lightning Bolts, quadra and lightly, which read two norms per tensor on the host. A share
of the copy above 100 % is possible because a copy also fetches the memory that it overwrites.
"""
COMMANDS = """\
## Measure it yourself

    python -m nox -s performance                   # CPU: all of it, then this page
    python -m nox -s performance -- --device cuda  # the same on an NVIDIA GPU
    python -m nox -s bench                         # pytest-benchmark: one optimizer after the other
    python -m nox -s bench -- --benchmark-compare --benchmark-compare-fail=median:10%
"""
STEP_NOTE = """\
bytes/param: read and written by the step's operations, nothing cached. of copy: share of the bandwidth of the copy. x SGD fused:
median of the ratios round by round. host us: until a step returns on an idle GPU. extra MiB: most memory that a step held beyond what
it found. \\*: writes to `.grad`.
"""
TRAINING_NOTE = """\
A training step is forward, backward, optimizer step and zero_grad. The first step is the optimizer's alone, with everything it
allocates, loads or compiles.
"""
ELSEWHERE_NOTE = """\
The same benchmark with some of the optimizers. How a second read compares with SGD depends on the memory, and how small tensors do
depends on the speed of one core.
"""


class Bound(NamedTuple):
    """What fastlars promises of its default on one model."""

    model: str
    against: str
    bound: float
    words: str = "at most {:.2f} times its time"

    def measured(self, results: Results) -> float | None:
        case = MODELS[self.model].title
        row = results.find(case, DEFAULT)
        if row is None or self.against == "host":
            return None if row is None else row.host_us
        if self.against == COPY:
            return results.share_of_copy(row)
        pair = (self.against, DEFAULT) if self.words == FASTER else (DEFAULT, self.against)
        return results.ratio(case, *pair)

    def kept(self, value: float) -> bool:
        return value <= self.bound if self.words.startswith("at most") else value >= self.bound


FASTER = "at least {:.1f} times as fast"
BOUNDS = {
    "cpu": (
        Bound("resnet50", YARDSTICK, 1.40),
        Bound("vit_b", YARDSTICK, 1.45),
        Bound("small", YARDSTICK, 1.80),
        Bound("resnet50", LOOP, 1.9, FASTER),
        Bound("vit_b", LOOP, 2.0, FASTER),
        Bound("small", LOOP, 5.0, FASTER),
    ),
    "cuda": (
        Bound("resnet50", YARDSTICK, 1.40),
        Bound("vit_b", YARDSTICK, 1.40),
        Bound("vit_l", YARDSTICK, 1.40),
        *(Bound(model, COPY, 0.85, "at least {:.2f} of its bandwidth") for model in ("resnet50", "vit_b", "vit_l")),
        Bound("resnet50", "host", 250, "at most {:.0f} us for a step"),
    ),
}


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


Column = tuple[str, Callable[[Results, Row], str]]
STEP_COLUMNS: tuple[Column, ...] = (
    ("optimizer", lambda _, row: title(row.contender) + (r" \*" if row.writes_grad else "")),
    ("bytes/param", lambda _, row: number(row.bytes_per_parameter, ".1f")),
    ("ms", lambda _, row: number(row.median, ".3g" if row.median < 100 else ".0f")),
    ("GB/s", lambda _, row: number(row.gb_s, ".1f")),
    ("of copy", lambda results, row: number(results.share_of_copy(row), ".0%").replace("%", " %")),
    ("x SGD fused", lambda results, row: number(results.relative(row, YARDSTICK))),
    ("launches", lambda _, row: number(row.launches, "d")),
    ("host reads", lambda _, row: number(row.host_reads, "d")),
    ("host us", lambda _, row: number(row.host_us, ".0f")),
    ("extra MiB", lambda _, row: "" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / 2**20:,.1f}"),
)
TRAINING_COLUMNS: tuple[Column, ...] = (
    STEP_COLUMNS[0],
    ("ms a training step", lambda _, row: number(row.median, ".1f")),
    ("x SGD fused", lambda results, row: number(results.ratio(row.case, row.contender, YARDSTICK), ".3f")),
    ("very first step, s", lambda _, row: number((row.first_step_ms or 0) / 1e3, ".3f")),
)


def table(header: list[str], rows: list[list[str]], left: int = 1) -> Iterator[str]:
    """Lines of a Markdown table; columns after the first `left` hold numbers."""
    yield "| " + " | ".join(header) + " |"
    yield "| " + " | ".join("---" if i < left else "---:" for i in range(len(header))) + " |"
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield ""


def with_a_read(results: Results, case: str) -> list[Row]:
    """The contenders, with fused SGD plus one more read after it."""
    rows = results.of_case(case)
    if (more := results.and_a_read(case, YARDSTICK)) is not None:
        place = [row.contender for row in rows].index(YARDSTICK) + 1
        rows.insert(place, replace(more, contender=f"{title(YARDSTICK)} and one more read"))
    return rows


def case_table(results: Results, case: str, columns: tuple[Column, ...]) -> Iterator[str]:
    """All that is known of a case; a column in which there is nothing to say is left out."""
    rows = with_a_read(results, case)
    bandwidths = [(name, row) for name in (COPY, READ) if (row := results.find(case, name)) is not None]
    about = f"{case}: {rows[0].tensors:,} tensors, {rows[0].elements / 1e6:,.1f} M parameters"
    about += "".join(f", {name} {number(row.gb_s, '.1f')} GB/s" for name, row in bandwidths)
    yield f"**{about}, {len(rows[0].ms)} rounds**\n"
    texts = {header: [text(results, row) for row in rows] for header, text in columns}
    filled = {header: column for header, column in texts.items() if any(column)}
    yield from table(list(filled), [list(row) for row in zip(*filled.values(), strict=True)])


def promises(results: Results, device: str) -> Iterator[str]:
    values = [(bound, bound.measured(results)) for bound in BOUNDS[device]]
    if any(value is not None for _, value in values):
        what = {"cpu": "its default on a CPU", "cuda": "fused=True on a data-centre GPU"}[device]
        yield f"What fastlars promises of {what}, and what this run measured:\n"
        rows = []
        for bound, value in values:
            kept = "not measured" if value is None else "kept" if bound.kept(value) else "not kept"
            words = bound.words.format(bound.bound)
            rows.append([MODELS[bound.model].title, title(bound.against), words, kept, number(value, ".0f" if bound.against == "host" else ".2f")])
        yield from table(["model", "against", "promised", "", "measured"], rows, left=4)


def section(stored: list[Results], elsewhere: list[Results], device: str) -> Iterator[str]:
    """One device: the picture, then everything in numbers; what other hosts measured comes last."""
    yield f"## {DEVICES[device]}\n"
    command = "`python -m nox -s performance" + ("`" if device == "cpu" else f" -- --device {device}`")
    step_time = find(stored, "step_time", device)
    if step_time is None:
        yield f"Not measured. {command} measures it.\n"
        return
    yield f"![{alt_text(step_time)}](performance-{device}.svg)\n"
    yield f"Measured on {sentence(step_time.machine)}\n"
    yield from promises(step_time, device)
    yield f"### The step alone\n\n{STEP_NOTE}"
    if not any(case.endswith(REAL) for case in step_time.cases):
        yield f"This run adapted every tensor; real param groups have not been measured yet. {command} measures them too.\n"
    yield from (f"{title(name)} was skipped: {reason}.\n" for name, reason in step_time.skipped.items())
    for case in step_time.cases:
        yield from case_table(step_time, case, STEP_COLUMNS)
    if (training := find(stored, "training_step", device)) is not None:
        yield f"### The whole training step\n\n{TRAINING_NOTE}"
        for case in training.cases:
            yield from case_table(training, case, TRAINING_COLUMNS)
    others = [results for results in elsewhere if results.machine["device"] == device]
    if others:
        yield f"### On other hosts\n\n{ELSEWHERE_NOTE}"
    for results in others:
        yield f"Measured on {sentence(results.machine)}\n"
        yield from promises(results, device)
        for case in results.cases:
            yield from case_table(results, case, STEP_COLUMNS)


def speed(stored: list[Results], elsewhere: list[Results]) -> Iterator[str]:
    """README's part: the default beside the other LARSes, and how many of the promises the run kept."""
    results = find(stored, "step_time", "cpu")
    if results is None:
        yield "Not measured. `python -m nox -s performance` measures it.\n"
        return
    known = dict.fromkeys(row.contender for row in results.rows)
    contenders = [DEFAULT, *(name for name in known if name in CONTENDERS and CONTENDERS[name].package)]
    cases = [case for case in results.cases if case.endswith(REAL)] or results.cases
    yield f"A step on a CPU, times the time of {title(YARDSTICK)} (median of the rounds):\n"
    rows = []
    for case in cases:
        ratios = [a_read(results, case), *(number(results.ratio(case, name, YARDSTICK)) for name in contenders)]
        rows.append([case.removesuffix(REAL), *ratios])
    yield from table(["", "SGD and one more read", *map(title, contenders)], rows)
    machine, values = results.machine, [(bound, bound.measured(results)) for bound in BOUNDS["cpu"]]
    kept = [bound.kept(value) for bound, value in values if value is not None]
    yield (
        f"The bytes alone, {TWO_PASSES} against {FLOOR}, make it {TWO_PASSES / FLOOR:.2f}; column 1 is the practical floor, SGD plus the "
        f"one extra read that LARS needs.\nMeasured on {machine['cpu']}, {machine['cores']} cores, torch "
        f"{machine['versions']['torch'].split('+')[0]}, {machine['date']}, load average at the start {machine['load']}.\n"
        f"Of the {len(kept)} bounds that fastlars sets itself this run kept {sum(kept)}: "
        "[which ones, and all else that was measured](docs/performance.md)."
    )
    for other in (other for other in elsewhere if other.machine["device"] == "cpu"):
        ratios = ", ".join(f"{number(other.ratio(case, DEFAULT, YARDSTICK))} on {case}" for case in other.cases)
        case = other.cases[0]
        copies = [number(run.find(case, COPY).gb_s, ".0f") for run in (other, results) if run.find(case, COPY)]
        floor = f"; SGD and one more read took {a_read(other, case)} on {case}" if a_read(other, case) else ""
        yield f"On another host, which copies {' GB/s instead of '.join(copies)}, it took {ratios}{floor}."
    if find(stored, "step_time", "cuda") is None:
        yield "Nothing has been measured on a GPU."
    yield ""


def a_read(results: Results, case: str) -> str:
    """What fused SGD and one more read take, in units of fused SGD."""
    row = results.and_a_read(case, YARDSTICK)
    return "" if row is None else number(results.relative(row, YARDSTICK))


def find(stored: list[Results], benchmark: str, device: str) -> Results | None:
    return next((r for r in stored if (r.benchmark, r.machine["device"]) == (benchmark, device)), None)


def alt_text(results: Results) -> str:
    """What the picture shows, for those who do not see it."""
    parts = [f"{title(YARDSTICK)} is 1"]
    for name in (DEFAULT, LOOP):
        ratios = [(case, results.ratio(case, name, YARDSTICK)) for case in results.cases]
        parts.append(f"{title(name)} " + ", ".join(f"{ratio:.2f} on {case}" for case, ratio in ratios if ratio))
    return f"Step time in units of torch's fused SGD, with a line at 1.4 (28 bytes a parameter): {'; '.join(parts)}."


def draw(results: Results, path: Path) -> None:
    """A step's time against fused SGD: a row a case, a mark a contender."""
    from matplotlib import pyplot as plt  # noqa: PLC0415  pages without pictures need none

    from .demo.figure import STYLE  # noqa: PLC0415

    others = dict.fromkeys(row.contender for row in results.rows if row.contender not in (COPY, READ, YARDSTICK, DEFAULT))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9.6, 2.6 + 0.5 * len(results.cases)), layout="constrained")
        for i, name in enumerate((DEFAULT, *others)):
            ratios = [(results.ratio(case, name, YARDSTICK), place) for place, case in enumerate(results.cases)]
            known = [(ratio, place) for ratio, place in ratios if ratio is not None]
            ours = name == DEFAULT
            look = {"color": "#0072B2", "marker": "o"} if ours else {"color": f"C{i % 9 + 1}", "marker": "s^vDX+*<>"[i % 9]}
            axes.scatter(*zip(*known, strict=True), **look, s=130 if ours else 55, zorder=4 if ours else 3, label=title(name))
        axes.axvline(1.0, color="black", linewidth=1, label=title(YARDSTICK))
        axes.axvline(TWO_PASSES / FLOOR, color="black", linewidth=1, linestyle="--", label="28 bytes against 20")
        axes.set(xscale="log", yticks=range(len(results.cases)), yticklabels=results.cases)
        axes.set_xticks(ticks := [1, 1.4, 2, 3, 5, 10], [f"{tick:g}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel(f"times the time of {title(YARDSTICK)}, the less the better")
        axes.invert_yaxis()
        figure.legend(loc="outside lower center", ncols=3)
        figure.savefig(path, metadata={"Date": None, "Identifier": drawn_from(results)})
        plt.close(figure)


def drawn_from(results: Results) -> str:
    """The fingerprint of the picture of these results."""
    return fingerprint(*(asdict(row) for row in results.rows))


def with_part(page: Path, text: str, name: str, lines: Iterator[str]) -> str:
    """The page with these lines between its two comments; the rest is written by hand."""
    head, begin, rest = text.partition(BEGIN.format(name))
    _, end, tail = rest.partition(END.format(name))
    if not begin or not end:
        raise SystemExit(f"render: {page} must hold the lines {BEGIN.format(name)!r} and {END.format(name)!r}")
    return "\n".join([f"{head}{begin}\n", *lines, f"{end}{tail}"])


def stored_in(folder: Path) -> list[Results]:
    return [load(path) for path in sorted(folder.glob("*.json"))]


def pages(stored: list[Results], elsewhere: list[Results]) -> dict[Path, str]:
    """The pages with measured parts, as they have to be."""
    sections = ["\n".join(section(stored, elsewhere, device)) for device in DEVICES]
    page = ROOT / "README.md"
    text = with_part(page, page.read_text(encoding="utf-8"), "speed", speed(stored, elsewhere))
    runs = outcome.read(DOCS / "demo" / "runs.csv")
    text = with_part(page, text, "demo", outcome.readme(runs))
    return {DOCS / "performance.md": "\n".join([INTRODUCTION, *sections, COMMANDS]), page: text}


def main() -> int:
    stored = stored_in(FOLDER)
    for path, text in pages(stored, stored_in(FOLDER / "elsewhere")).items():
        path.write_text(text, encoding="utf-8")
    for device in DEVICES:
        if (step_time := find(stored, "step_time", device)) is not None:
            draw(step_time, DOCS / f"performance-{device}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
