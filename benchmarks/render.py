"""Write measured figures into README and docs from stored results. No such figure is typed by hand.

Parts of docs/performance.md and README.md, and docs/speed.svg, come from benchmarks/results. A part of docs/start.md comes
from docs/demo/runs.csv, and a part of docs/study.md from benchmarks/results/study.csv. Files in benchmarks/results/elsewhere
are runs on other hosts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from .demo import outcome
from .demo.figure import STYLE
from .optimizers import PEERS, YARDSTICK, title
from .performance import REAL
from .results import COPY, FOLDER, Results, case_table, fingerprint, load, number, table
from .shapes import MODELS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DEFAULT = "fastlars-fused"  # the default on a CPU, and on a GPU with fused=True
BEGIN, END = "<!-- measured: {}; written by `python -m benchmarks.render` -->", "<!-- end of what was measured: {} -->"


def sentence(machine: dict[str, Any]) -> str:
    """The machine of a run, in one sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    if machine["device"] == "cuda":
        where = f"{machine['device_name']} (CUDA {machine['cuda']}), host {where}"
    where += f", {machine['system']}; Python {machine['python']}, {versions}"
    return f"{where}; commit {machine['commit']}, {machine['date']}; load average at the start {machine['load']}."


def section(runs: list[Results], device: str) -> Iterator[str]:
    """The part about one device, with this host's results first, then those of other hosts."""
    if not runs:
        yield f"Not measured. `python -m nox -s performance -- --device {device}` measures it.\n"
    for i, run in enumerate(runs):
        if i > 0:
            yield "### Another host\n"
        if not any(case.endswith(REAL) for case in run.cases):
            yield "In this run every tensor was adapted. Real param groups have not been measured yet.\n"
        yield from (f"{title(name)} was skipped: {reason}.\n" for name, reason in run.skipped.items())
        yield f"Measured on {sentence(run.machine)}\n"
        for case in run.cases:
            yield from case_table(run, case)


def launches(stored: Path) -> Iterator[str]:
    """What compiled steps launch on a GPU, as `compiled_launches` counted it, with one table per model."""
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
    """README's table, which compares the default with the other LARS optimizers."""
    measured = {row.contender for row in results.rows}
    contenders = [DEFAULT, *(name for name in PEERS if name in measured)]
    yield f"Time of a step on a CPU, as a multiple of {title(YARDSTICK)} (median of the rounds):\n"
    rows = []
    for case in real_cases(results):
        more = results.and_a_read(case, YARDSTICK)
        a_read = "" if more is None else number(results.relative(more, YARDSTICK))
        ratios = [number(results.ratio(case, name, YARDSTICK)) for name in contenders]
        rows.append([case.removesuffix(REAL), a_read, *ratios])
    yield from table(["", "SGD and one more read", *map(title, contenders)], rows)
    yield "Column 1 is the practical floor: SGD plus the one extra read that LARS needs."
    machine, torch = results.machine, results.machine["versions"]["torch"].split("+")[0]
    where = f"{machine['cpu']}, {machine['cores']} cores, torch {torch}, {machine['date']}"
    yield f"Measured on {where}: [all measurements](docs/performance.md)."
    for other in elsewhere:
        ratios = ", ".join(f"{number(other.ratio(case, DEFAULT, YARDSTICK))} on {case}" for case in other.cases)
        case = other.cases[0]
        copies = [number(run.find(case, COPY).gb_s, ".0f") for run in (other, results) if run.find(case, COPY)]
        yield f"On a host that copies {' GB/s instead of '.join(copies)}, fastlars took {ratios}."
    yield ""


def real_cases(results: Results) -> list[str]:
    """The cases with real param groups, if any."""
    return [case for case in results.cases if case.endswith(REAL)] or results.cases


def picture(results: Results, path: Path) -> None:
    """Draw README's picture, bars of the default and of two other packages on real models, as multiples of fused SGD."""
    cases = [case for case in real_cases(results) if MODELS["small"].title not in case]
    shown = {DEFAULT: ("fastlars", "#0072B2"), "lightly": ("lightly", "#E69F00"), "timm": ("timm", "#999999")}
    ratios = {name: [results.ratio(case, name, YARDSTICK) for case in cases] for name in shown}
    with plt.rc_context({**STYLE, "axes.grid": False, "axes.spines.bottom": False}):
        figure, axes = plt.subplots(figsize=(7.6, 0.4 + 0.72 * len(cases)), layout="constrained")
        for i, (name, (label, colour)) in enumerate(shown.items()):
            bars = axes.barh([y + 0.27 * i for y in range(len(cases))], ratios[name], 0.25, color=colour, label=label)
            axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=10)
        axes.axvline(1, color="#1a1a1a", linestyle="--", linewidth=1)
        axes.set_yticks([y + 0.27 for y in range(len(cases))], [case.removesuffix(REAL) for case in cases])
        axes.set_xticks([1], [f"1 = {title(YARDSTICK)}"])
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.legend(loc="lower right", ncols=len(shown), bbox_to_anchor=(1, 1))
        figure.savefig(path, metadata={"Source": fingerprint(ratios), "Date": None})
        plt.close(figure)


def runs_on(device: str) -> list[Results]:
    """This host's run, then those of other hosts."""
    files = (*sorted(FOLDER.glob("*.json")), *sorted(FOLDER.glob("elsewhere/*.json")))
    return [run for run in map(load, files) if run.machine["device"] == device]


def with_part(page: Path, text: str, name: str, lines: Iterator[str]) -> str:
    """The page with these lines between its two comments. The rest of the page is written by hand."""
    head, begin, rest = text.partition(BEGIN.format(name))
    _, end, tail = rest.partition(END.format(name))
    if not begin or not end:
        raise SystemExit(f"render: {page} must hold the lines {BEGIN.format(name)!r} and {END.format(name)!r}")
    return "\n".join([f"{head}{begin}\n", *lines, f"{end}{tail}"])


def pages() -> dict[Path, str]:
    """The expected text of each page with a measured part."""
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
    found = {}
    for page, of_page in parts.items():
        found[page] = page.read_text(encoding="utf-8")
        for name, lines in of_page.items():
            found[page] = with_part(page, found[page], name, lines)
    return found


def main() -> int:
    picture(runs_on("cpu")[0], DOCS / "speed.svg")
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
