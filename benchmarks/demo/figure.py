"""The picture: accuracy by batch, sensitivity to the lr, trust ratios by layer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files without a display

import numpy as np
import numpy.typing as npt
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from .report import Study, mean_and_std
from .training import Method, Result

Array = npt.NDArray[np.float64]

# Okabe and Ito's colours: distinct for colour-blind readers too. Line style and marker say the same once more.
OPTIMIZER_COLOURS = {"SGD": "#D55E00", "LARS": "#0072B2"}
LAYER_STYLES = (("#000000", "-"), ("#009E73", "--"), ("#CC79A7", "-."), ("#E69F00", ":"))
CHANCE = 10.0  # percent, ten classes
SMALLEST_ERROR = 0.05  # percent; where the log scale of the error ends, less than one image of the digits
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw(study: Study, path: Path, drawn_from: str) -> None:
    """Write the three panels as one PNG of 1600 x 560 pixels, in which ``drawn_from`` says of what runs."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(16, 5.6), dpi=100, layout="constrained")
        _accuracy_by_batch(axes[0], study)
        _accuracy_by_lr(axes[1], study)
        _trust_ratios(axes[2], study)
        figure.suptitle(_headline(study), fontsize=14, parse_math=False)  # a directory's name may hold a dollar sign
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(study.methods), fontsize=12)
        figure.savefig(path, metadata={"Source": drawn_from})
        plt.close(figure)


def _headline(study: Study) -> str:
    """The numbers of the largest batch; which variant of an optimizer stands here is chosen by validation."""
    parts = []
    for optimizer in dict.fromkeys(method.optimizer for method in study.methods):
        grids = {
            method: study.grids[study.largest, method] for method in study.methods if method.optimizer == optimizer
        }
        method = max(grids, key=lambda method: grids[method].score(grids[method].best))
        mean, std = mean_and_std(study.finals[study.largest, method])
        parts.append(f"{method.name}: {mean:.1f} ± {std:.1f} %")
    return (
        f"{study.dataset.name}, {study.protocol.epochs} epochs{' (quick run, no result)' if study.quick else ''}. "
        f"Test accuracy with the whole training set as one batch, mean ± std of {len(study.protocol.test_seeds)} seeds\n"
        f"(each optimizer with the bias lr better on validation): {'; '.join(parts)}"
    )


def _style(method: Method) -> dict[str, Any]:
    colour = OPTIMIZER_COLOURS[method.optimizer]
    if method.bias_lr is None:
        return {"color": colour, "linestyle": "--", "marker": "o", "markerfacecolor": "white"}
    return {"color": colour, "linestyle": "-", "marker": "o"}


def _accuracy_by_batch(axes: Axes, study: Study) -> None:
    batches = study.dataset.batches
    for i, method in enumerate(study.methods):
        shift = 0.14 * (i - (len(study.methods) - 1) / 2)  # side by side: dots of different methods never overlap
        positions = [position + shift for position in range(len(batches))]
        style = _style(method)
        finals = [study.finals[batch, method] for batch in batches]
        axes.plot(positions, [mean_and_std(results)[0] for results in finals], **{**style, "marker": ""})
        for position, results in zip(positions, finals, strict=True):
            accuracies = [result.accuracy for result in results]
            axes.plot([position] * len(results), accuracies, **{**style, "linestyle": ""}, markersize=5)
        axes.plot([], [], **style, label=method.name)  # for the legend: line and dot together
    error_scaled(axes, [result for results in study.finals.values() for result in results])
    axes.set_xticks(range(len(batches)), [*map(str, batches[:-1]), f"{batches[-1]} (all)"])
    axes.set(
        title="Test accuracy at the chosen lr\n(dot: one seed, line: mean)",
        xlabel="batch (images)",
        ylabel="test accuracy (%), log scale of error",
    )


def error_scaled(axes: Axes, results: Sequence[Result]) -> None:
    """Most differences lie above 90 %, and one run that failed would squeeze them: the log of the error shows both."""
    axes.set_yscale("function", functions=(_error_scale, _error_scale_inverse))
    errors = [100 - result.accuracy for result in results]
    axes.set_ylim(100 - 1.2 * max(errors), 100 - max(min(errors) / 1.2, SMALLEST_ERROR))
    axes.yaxis.set_major_locator(FixedLocator([10, 50, 80, 90, 95, 98, 99, 99.5, 99.9]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _error_scale(accuracy: Array) -> Array:
    return -np.log10(np.maximum(100 - accuracy, SMALLEST_ERROR))


def _error_scale_inverse(position: Array) -> Array:
    return 100 - 10**-position


def _accuracy_by_lr(axes: Axes, study: Study) -> None:
    relative_lrs: list[float] = []
    for method in study.methods:
        grid = study.grids[study.largest, method]
        ks = sorted(grid.trials)
        relative = [2 ** ((k - grid.best) / 2) for k in ks]
        relative_lrs += relative
        axes.plot(relative, [grid.score(k)[0] for k in ks], **_style(method))
    axes.axvline(1, color="#888888", linewidth=1, zorder=0)
    axes.axhline(CHANCE, color="#888888", linewidth=1, linestyle=":", zorder=0)
    axes.annotate("chance", (1, CHANCE), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#666666")
    octaves(axes, relative_lrs)
    axes.set(
        title=f"Sensitivity to the lr at batch {study.largest}\n(mean over the search seeds)",
        xlabel="lr / best lr of the same line",
        ylabel="validation accuracy (%)",
    )


def octaves(axes: Axes, relative_lrs: Sequence[float], most: int = 8) -> None:
    """An axis of powers of 2 that covers the lrs, with every second one named where there are `most` or more."""
    first, last = math.floor(math.log2(min(relative_lrs))), math.ceil(math.log2(max(relative_lrs)))
    step = 1 if last - first < most else 2
    axes.set_xscale("log", base=2)
    axes.set_xticks([2.0**i for i in range(first, last + 1) if i % step == 0])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}"))


def _trust_ratios(axes: Axes, study: Study) -> None:
    method = next(m for m in reversed(study.methods) if m.optimizer == "LARS")
    ratios_by_layer(axes, study.finals[study.largest, method])
    axes.set(
        title=f"Trust ratios at batch {study.largest},\n{method.name} (median and range of seeds)",
        xlabel="epoch",
    )


def ratios_by_layer(axes: Axes, results: Sequence[Result]) -> None:
    """Lines of the seeds' medians in bands of their ranges, against the number of the note: epochs or steps."""
    seeds = [result.trust_ratios for result in results]
    # a seed that diverged has fewer notes: the lines end where the first one ends
    notes = range(1, 1 + min(len(ratios) for seed in seeds for ratios in seed.values()))
    for layer, (colour, linestyle) in zip(seeds[0], LAYER_STYLES, strict=True):
        by_note = [[seed[layer][note - 1] for seed in seeds] for note in notes]
        medians = [statistics.median(ratios) for ratios in by_note]
        lowest, highest = [min(ratios) for ratios in by_note], [max(ratios) for ratios in by_note]
        axes.plot(notes, medians, color=colour, linestyle=linestyle, linewidth=2, label=layer)
        axes.fill_between(notes, lowest, highest, color=colour, alpha=0.12, linewidth=0)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="weight of layer", handlelength=2.5)
    axes.set_ylabel("trust ratio (factor on the lr)")
