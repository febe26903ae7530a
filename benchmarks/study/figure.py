"""The three pictures of the page, and what they show in words."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files without a display

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.demo.figure import CHANCE, STYLE, error_scaled, octaves, ratios_by_layer

from .methods import MAIN
from .outcome import Outcome
from .report import LARS, plateau, plateau_words

# Okabe and Ito's colours, distinct for colour-blind readers too; line and marker say the same once more.
MARKS: dict[str, dict[str, Any]] = {
    "SGD": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "SGD with Nesterov": {"color": "#E69F00", "linestyle": ":", "marker": "D"},
    "SGD with clipping": {"color": "#CC79A7", "linestyle": "-.", "marker": "^"},
    "AdamW": {"color": "#009E73", "linestyle": (0, (6, 2)), "marker": "v"},
    "LARS": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
}


def draw(outcome: Outcome, folder: Path) -> list[tuple[str, str]]:
    """Write the pictures; returns the name and the text alternative of each."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [
        ("lr.svg", _by_lr(outcome, folder / "lr.svg")),
        ("batch.svg", _by_batch(outcome, folder / "batch.svg")),
    ]
    if outcome.finals.get((outcome.largest, LARS.method)):
        pictures.append(("ratios.svg", _ratios(outcome, folder / "ratios.svg")))
    return pictures


@contextmanager
def _picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    # with no date and no random names in it, the same results make the same file
    with plt.rc_context({**STYLE, "svg.hashsalt": "fastlars", "figure.facecolor": "white"}):
        figure = plt.figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _by_lr(outcome: Outcome, path: Path) -> str:
    batch, words = outcome.largest, []
    with _picture(path, 9.5, 6.6) as figure:
        panels = figure.subplots(2, 3, sharex=True, sharey=True).flat
        for axes in panels[len(MAIN) :]:
            axes.set_axis_off()
        everywhere: list[float] = []
        for axes, row in zip(panels, MAIN, strict=False):
            grid, mark = outcome.grids[batch, row.method], MARKS[row.name]
            ks = sorted(grid.trials)
            lrs = [grid.lr(k) / grid.best_lr for k in ks]
            everywhere += lrs
            flat = plateau(grid)
            axes.axvspan(flat.low / grid.best_lr / 1.06, flat.high / grid.best_lr * 1.06, color="#dddddd", zorder=0)
            axes.axhline(CHANCE, color="#888888", linewidth=1, linestyle=":", zorder=0)
            axes.plot(lrs, [grid.score(k)[0] for k in ks], color=mark["color"], linewidth=1.5)
            for lr, k in zip(lrs, ks, strict=True):
                accuracies = [result.accuracy for result in grid.trials[k]]
                axes.plot([lr] * len(accuracies), accuracies, **{**mark, "linestyle": ""}, markersize=5, alpha=0.75)
            failed = " (failed)" if outcome.failed(batch, row) else ""
            axes.set_title(f"{row.name}{failed}\nbest lr {grid.best_lr:.3g}: {grid.score(grid.best)[0]:.1f} %")
            words.append(f"{row.name} {plateau_words(grid)}")
        figure.get_layout_engine().set(wspace=0.08)  # type: ignore[union-attr, call-arg]
        octaves(panels[0], everywhere, most=5)
        panels[0].set_ylim(0, 100)
        panels[2].tick_params(labelbottom=True)  # nothing stands below it
        figure.supylabel("validation accuracy (%)", fontsize=12)
        figure.supxlabel("lr / best lr of the method", fontsize=12)
    return (
        f"Validation accuracy against lr divided by the best lr at batch {batch}, a panel a method, a dot a seed, a line "
        f"through the means; grey is what lies within a point of the best, a factor of: {'; '.join(words)}."
    )


def _by_batch(outcome: Outcome, path: Path) -> str:
    words = []
    with _picture(path, 8.5, 5.6) as figure:
        axes = figure.subplots()
        for row in MAIN:
            found = [
                (batch, outcome.finals[batch, row.method])
                for batch in outcome.batches
                if not outcome.failed(batch, row)
            ]
            batches, results = [batch for batch, _ in found], [[r.accuracy for r in finals] for _, finals in found]
            mark = MARKS[row.name]
            means = [statistics.mean(accuracies) for accuracies in results]
            axes.plot(batches, means, **mark, linewidth=2, markersize=6, label=row.name)
            axes.fill_between(
                batches, [*map(min, results)], [*map(max, results)], color=mark["color"], alpha=0.13, linewidth=0
            )
            words.append(f"{row.name} {', '.join(f'{mean:.1f}' for mean in means)}")
        error_scaled(
            axes,
            [result for row in MAIN for b in outcome.batches for result in outcome.finals.get((b, row.method), [])],
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(outcome.batches, [*map(str, outcome.batches)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="batch (images)", ylabel="test accuracy (%), log scale of error")
        above = axes.secondary_xaxis("top")
        above.set_xticks(outcome.batches, [str(outcome.steps(batch)) for batch in outcome.batches])
        above.xaxis.set_minor_locator(NullLocator())
        above.set_xlabel(f"steps in {outcome.protocol.epochs} epochs")
        axes.legend(loc="lower left", handlelength=4)
    return (
        f"Test accuracy against the batch, means of {len(outcome.protocol.test_seeds)} seeds in bands from the lowest to the highest; at "
        f"{', '.join(map(str, outcome.batches))} images: {'; '.join(words)} %."
    )


def _ratios(outcome: Outcome, path: Path) -> str:
    results = outcome.finals[outcome.largest, LARS.method]
    with _picture(path, 8.5, 4.4) as figure:
        axes = figure.subplots()
        ratios_by_layer(axes, results)
        axes.set(xlabel="step", title=f"LARS at batch {outcome.largest}: median and range of {len(results)} seeds")
    ends = {
        layer: [statistics.median(result.trust_ratios[layer][at] for result in results) for at in (0, -1)]
        for layer in results[0].trust_ratios
    }
    words = "; ".join(f"{layer} {first:.2g} and {last:.2g}" for layer, (first, last) in ends.items())
    return f"Trust ratios of LARS by layer against the step, at batch {outcome.largest}; at the first and the last step: {words}."
