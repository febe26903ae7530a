"""The demo's picture, and the style of all pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, NullLocator

from benchmarks.results import fingerprint

from .outcome import TITLES, Row, accuracies, batches, mean

# Okabe and Ito's colours, which colour-blind readers can also tell apart. Line style and marker differ as well.
LINES = {"LARS": ("#0072B2", "-", "o", max, 12), "SGD": ("#D55E00", "--", "s", min, -13)}
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fastlars",  # the same results give the same file
}


def draw(rows: Sequence[Row], data: str, path: Path) -> None:
    """Draw test accuracy against the batch, with a line through the means and one dot per seed."""
    sizes = batches(rows)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 4.4), dpi=200, layout="constrained")
        for name, (colour, style, marker, edge, above) in LINES.items():
            means = [mean(rows, name, batch) for batch in sizes]
            words: dict[str, Any] = {"textcoords": "offset points", "color": colour, "va": "center"}
            axes.plot(sizes, means, color=colour, linestyle=style, linewidth=3)
            for batch, height in zip(sizes, means, strict=True):
                seeds = accuracies(rows, name, batch)
                axes.plot([batch] * len(seeds), seeds, marker, color=colour, markersize=6, alpha=0.6)
                axes.annotate(f"{height:.1f}", (batch, edge(seeds)), (0, above), ha="center", weight="bold", **words)
            axes.annotate(TITLES[name].replace(", ", "\n", 1), (sizes[-1], means[-1]), (14, 0), **words)
        lowest = min(float(row["accuracy_percent"]) for row in rows if row["name"] in LINES)
        axes.set_ylim(max(0.0, 2 * math.floor(lowest / 2) - 2), 101)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xscale("log")
        axes.set_xticks(sizes, [*map(str, sizes[:-1]), f"{sizes[-1]} (all)"])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(f"batch ({data}, {rows[0]['epochs']} epochs each)", parse_math=False)
        axes.set_ylabel("test accuracy (%)")
        ends = ", ".join(f"{name} {mean(rows, name, sizes[-1]):.1f} %" for name in LINES)
        axes.set_title(f"All training images in one batch: {ends}", loc="left", weight="bold")
        figure.savefig(path, metadata={"Source": drawn_from(rows)})
        plt.close(figure)


def drawn_from(rows: Sequence[Row]) -> str:
    """The fingerprint of the picture of these runs. It does not depend on how long they took."""
    return fingerprint(*[{name: value for name, value in row.items() if name != "seconds"} for row in rows])
