"""Write what is measured into README and docs, from what is stored: no such figure is typed by hand.

docs/performance.md, docs/speed.svg and a part of README.md come from benchmarks/results/*.json, a part of docs/start.md from
docs/demo/runs.csv, and a part of docs/study.md from benchmarks/results/study.csv. Files in benchmarks/results/elsewhere are runs on
other hosts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .demo import outcome
from .optimizers import CONTENDERS, LOOP, YARDSTICK, title
from .performance import REAL
from .results import COPY, FOLDER, Results, case_table, load, number, table
from .shapes import MODELS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DEFAULT = "fastlars-fused"  # what a CPU user gets, and with fused=True a GPU user
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
BEGIN, END = "<!-- measured: {}; written by `python -m benchmarks.render` -->", "<!-- end of what was measured: {} -->"
INTRODUCTION = """\
<!-- Written by `python -m benchmarks.render` from benchmarks/results; edit that. -->

# Performance

All times are compared with torch's fused SGD, which moves 20 bytes per float32 parameter. LARS needs one more read of parameters
and gradients for the norms: 28 bytes, 1.4 times as many, or 20 where a cache serves the second read ([why it is fast](bytes.md)).
The extra read can cost more than 40 % on machines whose reads are slow, so each table has a row for fused SGD plus one more read at
the speed this machine read at in the same round. A result below that row got part of the read from a cache.

Contenders are interleaved. In each round every contender takes one step on the same tensors, in a new order, next to a 256 MiB copy that
measures the bandwidth. Milliseconds are medians, and ratios are medians of the ratios within a round. On a CPU, caches hold what the
previous contender left. On a GPU, the L2 cache is flushed before each step and the device waits until the host is ahead of it, as in
training. All contenders use momentum and weight decay. In cases marked "weights adapted", biases and norms are neither adapted nor decayed,
as with `param_groups`. In the others, each LARS adapts every tensor (except pytorch_optimizer's, which leaves vectors out). The "quadra
loop" is our minimal version of the loop in Lightning Bolts, quadra and lightly, which read two norms per tensor on the host. A share of the
copy above 100 % is possible because a copy also reads the memory that it overwrites.
"""
COMMANDS = """\
## Measure it yourself

    python -m nox -s performance                   # CPU, then this page
    python -m nox -s performance -- --device cuda  # the same on an NVIDIA GPU
    python -m nox -s bench                         # pytest-benchmark: one optimizer after the other
    python -m nox -s bench -- --benchmark-compare --benchmark-compare-fail=median:10%
"""
NOTE = """\
- **bytes/param**: what the operations of a step read and write, if nothing is cached
- **of copy**: share of the bandwidth of the copy
- **x SGD fused**: time as a multiple of fused SGD's, as the median of the ratios in each round
- **host us**: microseconds until a step returns on an idle GPU
- **\\***: writes to `.grad`
"""
ELSEWHERE_NOTE = """\
The same benchmark with some of the optimizers. How a second read compares with SGD depends on the memory, and how small tensors do
depends on the speed of one core.
"""


# Bounds for the default: at most this many times another's time.
BOUNDS = {
    ("resnet50", YARDSTICK): 1.40,
    ("vit_b", YARDSTICK): 1.45,
    ("small", YARDSTICK): 1.80,
    ("resnet50", LOOP): 0.53,
    ("vit_b", LOOP): 0.50,
    ("small", LOOP): 0.20,
}


def sentence(machine: dict[str, Any]) -> str:
    """The same as one sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    if machine["device"] == "cuda":
        where = f"{machine['device_name']} (CUDA {machine['cuda']}), host {where}"
    return (
        f"{where}, {machine['system']}; Python {machine['python']}, {versions}; commit {machine['commit']}, "
        f"{machine['date']}; load average at the start {machine['load']}."
    )


def promises(results: Results) -> Iterator[tuple[str, str, float, float]]:
    """Model, against whom, bound and what was measured."""
    for (model, against), bound in BOUNDS.items():
        if (measured := results.ratio(MODELS[model].title, DEFAULT, against)) is not None:
            yield MODELS[model].title, title(against), bound, measured


def section(stored: list[Results], elsewhere: list[Results], device: str) -> Iterator[str]:
    """One device: this host, then what other hosts measured."""
    yield f"## {DEVICES[device]}\n"
    results = find(stored, device)
    if results is None:
        yield f"Not measured. `python -m nox -s performance -- --device {device}` measures it.\n"
        return
    yield NOTE
    if not any(case.endswith(REAL) for case in results.cases):
        yield "In this run every tensor was adapted. Real param groups have not been measured yet.\n"
    yield from (f"{title(name)} was skipped: {reason}.\n" for name, reason in results.skipped.items())
    for run in (results, *(other for other in elsewhere if other.machine["device"] == device)):
        if run is not results:
            yield f"### Another host\n\n{ELSEWHERE_NOTE}"
        yield f"Measured on {sentence(run.machine)}\n"
        yield "The bounds that we set for the default, as multiples of the other's time, and what this run measured:\n"
        header = ["model", "against", "", "at most", "measured"]
        kept = {True: "kept", False: "not kept"}
        bounds = [[*names, kept[x <= bound], f"{bound:.2f}", f"{x:.2f}"] for *names, bound, x in promises(run)]
        yield from table(header, bounds, left=3)
        for case in run.cases:
            yield from case_table(run, case)


def speed(stored: list[Results], elsewhere: list[Results]) -> Iterator[str]:
    """README's table: the default beside the other LARSes, and how many of the bounds the run kept."""
    results = find(stored, "cpu")
    if results is None:
        yield "Not measured. `python -m nox -s performance` measures it.\n"
        return
    contenders = [DEFAULT, *packages(results)]
    yield f"Time of a step on a CPU, as a multiple of {title(YARDSTICK)} (median of the rounds):\n"
    rows = []
    for case in real_cases(results):
        ratios = [a_read(results, case), *(number(results.ratio(case, name, YARDSTICK)) for name in contenders)]
        rows.append([case.removesuffix(REAL), *ratios])
    yield from table(["", "SGD and one more read", *map(title, contenders)], rows)
    machine, kept = results.machine, [measured <= bound for *_, bound, measured in promises(results)]
    yield (
        "Column 1 is the practical floor: SGD plus the one extra read that LARS needs.\n"
        f"Measured on {machine['cpu']}, {machine['cores']} cores, torch {machine['versions']['torch'].split('+')[0]}, "
        f"{machine['date']}. This run kept {sum(kept)} of the {len(kept)} bounds that we set: "
        "[all measurements](docs/performance.md)."
    )
    for other in (other for other in elsewhere if other.machine["device"] == "cpu"):
        ratios = ", ".join(f"{number(other.ratio(case, DEFAULT, YARDSTICK))} on {case}" for case in other.cases)
        case = other.cases[0]
        copies = [number(run.find(case, COPY).gb_s, ".0f") for run in (other, results) if run.find(case, COPY)]
        yield f"On a host that copies {' GB/s instead of '.join(copies)}, fastlars took {ratios}."
    yield ""


def packages(results: Results) -> list[str]:
    """The contenders that are packages of others."""
    known = dict.fromkeys(row.contender for row in results.rows)
    return [name for name in known if name in CONTENDERS and CONTENDERS[name].package]


def real_cases(results: Results) -> list[str]:
    """Those with real param groups, if there are any."""
    return [case for case in results.cases if case.endswith(REAL)] or results.cases


def picture(stored: list[Results]) -> str:
    """README's picture: bars of the default and of two other packages on real models, as multiples of fused SGD."""
    results = find(stored, "cpu")
    assert results is not None, "the picture is of a run on a CPU"
    cases = [case for case in real_cases(results) if MODELS["small"].title not in case]
    shown = {DEFAULT: ("fastlars", "#0072B2"), "lightly": ("lightly", "#E69F00"), "timm": ("timm", "#999999")}
    left, unit, bar, gap = 110, 105, 15, 16
    lines, y = [], 34
    for case in cases:
        middle = y + bar * len(shown) / 2 + 5
        lines.append(f'<text x="{left - 8}" y="{middle:g}" text-anchor="end">{case.removesuffix(REAL)}</text>')
        for name, (_, colour) in shown.items():
            ratio = results.ratio(case, name, YARDSTICK)
            assert ratio is not None, f"{name} on {case}"
            lines.append(f'<rect x="{left}" y="{y}" width="{ratio * unit:.1f}" height="{bar - 2}" fill="{colour}"/>')
            lines.append(f'<text x="{left + ratio * unit + 6:.1f}" y="{y + bar - 4}" font-size="12">{ratio:.2f}</text>')
            y += bar
        y += gap
    lines.append(f'<path d="M{left + unit},28 V{y - gap + 4}" stroke="#1a1a1a" stroke-dasharray="4 3"/>')
    lines.append(f'<text x="{left + unit}" y="{y + 6}" text-anchor="middle">1 = torch SGD(fused=True)</text>')
    x = left
    for label, colour in shown.values():
        lines.append(
            f'<rect x="{x}" y="8" width="12" height="12" fill="{colour}"/><text x="{x + 18}" y="19">{label}</text>'
        )
        x += 110
    size = f"0 0 {left + 5 * unit} {y + 18}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="sans-serif" font-size="14" fill="#1a1a1a">',
            "<title>Time of a step on a CPU, as a multiple of torch SGD(fused=True)</title>",
            '<rect width="100%" height="100%" rx="6" fill="#ffffff"/>',
            *lines,
            "</svg>\n",
        ]
    )


def a_read(results: Results, case: str) -> str:
    """What fused SGD and one more read take, in units of fused SGD."""
    row = results.and_a_read(case, YARDSTICK)
    return "" if row is None else number(results.relative(row, YARDSTICK))


def find(stored: list[Results], device: str) -> Results | None:
    return next((results for results in stored if results.machine["device"] == device), None)


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
    from . import study  # noqa: PLC0415  it uses this module's tables

    sections = ["\n".join(section(stored, elsewhere, device)) for device in DEVICES]
    page, start = ROOT / "README.md", DOCS / "start.md"
    demo = outcome.readme(outcome.read(DOCS / "demo" / "runs.csv"))
    return {
        page: with_part(page, page.read_text(encoding="utf-8"), "speed", speed(stored, elsewhere)),
        start: with_part(start, start.read_text(encoding="utf-8"), "demo", demo),
        DOCS / "speed.svg": picture(stored),
        DOCS / "performance.md": "\n".join([INTRODUCTION, *sections, COMMANDS]),
        DOCS / "study.md": study.rendered(),
    }


def main() -> int:
    stored = stored_in(FOLDER)
    for path, text in pages(stored, stored_in(FOLDER / "elsewhere")).items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
