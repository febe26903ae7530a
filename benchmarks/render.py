"""Write what is measured into README and docs, from what is stored: no such figure is typed by hand.

Parts of docs/performance.md and README.md, and docs/speed.svg, come from benchmarks/results, a part of docs/start.md from
docs/demo/runs.csv, and a part of docs/study.md from benchmarks/results/study.csv. Files in benchmarks/results/elsewhere are runs on
other hosts.
"""

from __future__ import annotations

import json
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
BEGIN, END = "<!-- measured: {}; written by `python -m benchmarks.render` -->", "<!-- end of what was measured: {} -->"

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
    """The machine of a run, in one sentence."""
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


def section(runs: list[Results], device: str) -> Iterator[str]:
    """One device: this host, then what other hosts measured."""
    if not runs:
        yield f"Not measured. `python -m nox -s performance -- --device {device}` measures it.\n"
    for i, run in enumerate(runs):
        if i > 0:
            yield "### Another host\n"
        if not any(case.endswith(REAL) for case in run.cases):
            yield "In this run every tensor was adapted. Real param groups have not been measured yet.\n"
        yield from (f"{title(name)} was skipped: {reason}.\n" for name, reason in run.skipped.items())
        yield f"Measured on {sentence(run.machine)}\n"
        yield "The bounds that we set for the default, as multiples of the other's time, and what this run measured:\n"
        header = ["model", "against", "", "at most", "measured"]
        kept = {True: "kept", False: "not kept"}
        bounds = [[*names, kept[x <= bound], f"{bound:.2f}", f"{x:.2f}"] for *names, bound, x in promises(run)]
        yield from table(header, bounds, left=3)
        for case in run.cases:
            yield from case_table(run, case)


def launches(stored: Path) -> Iterator[str]:
    """What compiled steps launch on a GPU, as `compiled_launches` has counted it: a table a model."""
    content = json.loads(stored.read_text(encoding="utf-8"))
    dtypes = ("float32", "bfloat16", "float16")
    yield f"torch {content['torch'].split('+')[0]}:\n"
    for model, cases in content["cells"].items():
        header = [f"{model}: launches + norm operators", *dtypes, *(f"bytes/param, {dtype}" for dtype in dtypes)]
        rows = []
        for case, by_dtype in cases.items():
            found = [by_dtype.get(dtype) for dtype in dtypes]
            counts = [f"{cell['launches']} + {cell['operators']}" if cell else "" for cell in found]
            rows.append([case, *counts, *(f"{cell['bytes']:g}" if cell else "" for cell in found)])
        yield from table(header, rows)


def speed(results: Results, elsewhere: list[Results]) -> Iterator[str]:
    """README's table: the default beside the other LARSes, and how many of the bounds the run kept."""
    contenders = [DEFAULT, *packages(results)]
    yield f"Time of a step on a CPU, as a multiple of {title(YARDSTICK)} (median of the rounds):\n"
    rows = []
    for case in real_cases(results):
        more = results.and_a_read(case, YARDSTICK)
        a_read = "" if more is None else number(results.relative(more, YARDSTICK))
        ratios = [number(results.ratio(case, name, YARDSTICK)) for name in contenders]
        rows.append([case.removesuffix(REAL), a_read, *ratios])
    yield from table(["", "SGD and one more read", *map(title, contenders)], rows)
    machine, kept = results.machine, [measured <= bound for *_, bound, measured in promises(results)]
    yield (
        "Column 1 is the practical floor: SGD plus the one extra read that LARS needs.\n"
        f"Measured on {machine['cpu']}, {machine['cores']} cores, torch {machine['versions']['torch'].split('+')[0]}, "
        f"{machine['date']}. This run kept {sum(kept)} of the {len(kept)} bounds that we set: "
        "[all measurements](docs/performance.md)."
    )
    for other in elsewhere:
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


def picture(results: Results) -> str:
    """README's picture: bars of the default and of two other packages on real models, as multiples of fused SGD."""
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


def runs_on(device: str) -> list[Results]:
    """This host's run, then those of other hosts."""
    files = (*sorted(FOLDER.glob("*.json")), *sorted(FOLDER.glob("elsewhere/*.json")))
    return [run for run in map(load, files) if run.machine["device"] == device]


def with_part(page: Path, text: str, name: str, lines: Iterator[str]) -> str:
    """The page with these lines between its two comments; the rest is written by hand."""
    head, begin, rest = text.partition(BEGIN.format(name))
    _, end, tail = rest.partition(END.format(name))
    if not begin or not end:
        raise SystemExit(f"render: {page} must hold the lines {BEGIN.format(name)!r} and {END.format(name)!r}")
    return "\n".join([f"{head}{begin}\n", *lines, f"{end}{tail}"])


def pages() -> dict[Path, str]:
    """The pages with measured parts, as they have to be."""
    from . import study  # noqa: PLC0415  it uses this module's tables

    cpu, cuda = runs_on("cpu"), runs_on("cuda")
    of_performance = {"cpu": section(cpu, "cpu"), "cuda": section(cuda, "cuda")}
    of_performance["launches"] = launches(FOLDER / "compiled" / "launches.json")
    parts = {
        ROOT / "README.md": {"speed": speed(cpu[0], cpu[1:])},
        DOCS / "start.md": {"demo": outcome.readme(outcome.read(DOCS / "demo" / "runs.csv"))},
        DOCS / "performance.md": of_performance,
        DOCS / "study.md": {"study": study.tables(study.study(study.again))},
    }
    found = {DOCS / "speed.svg": picture(cpu[0])}
    for page, of_page in parts.items():
        found[page] = page.read_text(encoding="utf-8")
        for name, lines in of_page.items():
            found[page] = with_part(page, found[page], name, lines)
    return found


def main() -> int:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
