"""The picture of the performance page: time against fused SGD, and cost against size, with the floors drawn in."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files without a display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from .optimizers import OURS, YARDSTICK
from .results import COPY, FLOOR, READ, SERIES, TWO_PASSES, Results, fingerprint
from .tables import title

# Okabe and Ito's colours, distinct for colour-blind readers too; the markers say the same once more.
MARKS = {
    YARDSTICK: ("#000000", "|"),
    "fastlars-fused": ("#0072B2", "o"),
    "fastlars-foreach": ("#56B4E9", "s"),
    "fastlars-single": ("#56B4E9", "^"),
    "sgd-foreach": ("#999999", "s"),
    "sgd-loop": ("#999999", "^"),
    "quadra-loop": ("#D55E00", "X"),
    "lightly": ("#D55E00", "+"),
    "timm": ("#E69F00", "D"),
    "pytorch_optimizer": ("#CC79A7", "v"),
}
UNKNOWN = ("#009E73", "*")
TICKS = (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100)  # times fused SGD; a GPU's loops are far out
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.hashsalt": "fastlars",  # with no date in it, the same results make the same file
}


def draw(step_time: Results, scaling: Results | None, path: Path) -> None:
    series = [name for name in SERIES if scaling and any(row.case.startswith(f"{name}:") for row in scaling.rows)]
    rows = [["step"] * max(1, len(series)), *([series] if series else [])]  # as wide as a page's text
    with plt.rc_context(STYLE):
        figure, axes = plt.subplot_mosaic(rows, figsize=(9.6, 1.0 + 4.4 * len(rows)), layout="constrained")
        _against_sgd(axes["step"], step_time)
        for name in series:
            assert scaling is not None
            _against_size(axes[name], scaling, name)
        handles, labels = axes["step"].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        metadata = {"Date": None, "Identifier": drawn_from(step_time, scaling)} if path.suffix == ".svg" else None
        figure.savefig(path, bbox_inches="tight", metadata=metadata)
        plt.close(figure)


def drawn_from(step_time: Results, scaling: Results | None) -> str:
    """The fingerprint of the picture of these results."""
    return fingerprint(*[asdict(row) for results in (step_time, scaling) if results for row in results.rows])


def alt_text(step_time: Results, scaling: Results | None) -> str:
    """What the picture shows, for those who do not see it."""
    parts = []
    for contender in (OURS[0], "quadra-loop"):
        ratios = [(case, step_time.ratio(case, contender, YARDSTICK)) for case in step_time.cases]
        known = ", ".join(f"{ratio:.2f} on {case}" for case, ratio in ratios if ratio is not None)
        if known:
            parts.append(f"{title(contender)} {known}")
    text = "Step time in units of torch's fused SGD, with lines at 1.0 (20 bytes a parameter) and 1.4 (28 bytes): "
    text += "; ".join(parts) + "."
    if scaling is not None:
        text += (
            " Below it, milliseconds against the number of tensors and of parameters, with the time of 20 and 28 bytes."
        )
    return text


def _against_sgd(axes: Axes, results: Results) -> None:
    cases = results.cases
    for contender in dict.fromkeys(row.contender for row in results.rows if row.contender not in (COPY, READ)):
        colour, marker = MARKS.get(contender, UNKNOWN)
        ratios = [(results.ratio(case, contender, YARDSTICK), i) for i, case in enumerate(cases)]
        known = [(ratio, i) for ratio, i in ratios if ratio is not None]
        # hollow, so that one mark over another leaves both visible; ours is filled
        filled = marker in "|+X" or contender == OURS[0]
        axes.scatter(
            [ratio for ratio, _ in known],
            [i for _, i in known],
            color=colour,
            facecolor=None if filled else "none",
            marker=marker,
            s=70,
            label=title(contender),
            zorder=4 if contender == OURS[0] else 3,
        )
    reads = [(i, results.and_a_read(case, YARDSTICK)) for i, case in enumerate(cases)]
    ends = [(results.relative(row, YARDSTICK), i) for i, row in reads if row is not None]
    if ends:
        what = f"{title(YARDSTICK)} and one more read"
        axes.scatter(*zip(*ends, strict=True), color="#666666", marker="|", s=300, label=what, zorder=2)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.axvline(TWO_PASSES / FLOOR, color="black", linewidth=1, linestyle="--")
    axes.set(
        xscale="log", yticks=range(len(cases)), yticklabels=cases, xlabel="times the time of torch SGD(fused=True)"
    )
    axes.invert_yaxis()
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in TICKS if low <= tick <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("A step, against fused SGD\nsolid: 20 bytes a parameter, dashed: 28")


def _against_size(axes: Axes, results: Results, series: str) -> None:
    rows = [row for row in results.rows if row.case.startswith(f"{series}:")]
    for contender in dict.fromkeys(row.contender for row in rows if row.contender not in (COPY, READ)):
        colour, marker = MARKS.get(contender, UNKNOWN)
        points = [(getattr(row, series), row.median) for row in rows if row.contender == contender]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker)
    copies = [row.gb_s for row in rows if row.contender == COPY and row.gb_s is not None]
    sizes = sorted({(getattr(row, series), row.elements) for row in rows})
    for count, style in ((FLOOR, "-"), (TWO_PASSES, "--")) if copies else ():
        floor = [elements * count / statistics.median(copies) / 1e6 for _, elements in sizes]
        axes.plot([size for size, _ in sizes], floor, color="#666666", linewidth=1, linestyle=style)
    axes.set(xscale="log", yscale="log", ylabel="ms a step", xlabel="tensors" if series == "tensors" else "parameters")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    fixed = {row.elements if series == "tensors" else row.tensors for row in rows}
    what = " and ".join(f"{value:,}" for value in sorted(fixed)) + (
        " parameters" if series == "tensors" else " tensors"
    )
    axes.set_title(f"{what} in all\ngrey: 20 and 28 (dashed) bytes at copy speed")
