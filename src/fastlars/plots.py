"""Plots. They need matplotlib (the extra ``plot``), which is imported only when you draw one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["trust_ratios"]

# colours outside the scale, which runs from dark blue through green to yellow
_NO_RATIO = "#d4d4d4"
_NOT_FINITE = "#d62728"
_LINE = 0.17  # inches per row label
_MOST_LINES = 80  # a new figure with up to this many rows labels every row; a larger one labels only some


def trust_ratios(
    history: Mapping[int, Mapping[str, float]], *, names: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw trust ratios as a heat map: one row per tensor, one column per recorded step, colours on a log scale.

    Grey means that there is no ratio, because the tensor is not adapted or had no gradient. Red marks a ratio that is not
    finite, because the gradient was not finite.

    Args:
        history: a dict from step to what :meth:`fastlars.LARS.trust_ratios` returned, in increasing order of steps.
        names: names of the rows from top to bottom. ``[name for name, _ in model.named_parameters()]`` also shows the
            tensors that are not adapted. If None (default), all tensors with a ratio in any step are shown.
        ax: axes to draw on. If None (default), a new pyplot figure is made, sized for its rows and names.

    Returns:
        The axes. ``ax.figure.savefig("ratios.png")`` saves the picture.

    Raises:
        ImportError: if matplotlib cannot be imported.
        ValueError: if steps do not increase, or there is no ratio to draw.

    Example:
        >>> history = {0: {"0.weight": 2e-3, "2.weight": 1e-4}, 10: {"0.weight": 5e-4, "2.weight": 3e-4}}
        >>> ax = fastlars.plots.trust_ratios(history)
        >>> ax.figure.savefig("ratios.png")
    """
    steps = list(history)
    if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise ValueError(f"the steps of history must increase, got {steps}")
    rows = list(dict.fromkeys(name for ratios in history.values() for name in ratios)) if names is None else list(names)
    cells = [[history[step].get(row) for step in steps] for row in rows]
    known = [ratio for row in cells for ratio in row if ratio is not None]
    drawn = [ratio for ratio in known if 0 < ratio < math.inf]
    if not drawn:
        raise ValueError(
            f"no ratio to draw in {len(steps)} steps and {len(rows)} rows; record optimizer.trust_ratios() after "
            "backward() and before zero_grad(), and take names from its keys"
        )

    try:
        # imported here, because matplotlib is an extra and slow to import
        from matplotlib import colormaps, pyplot  # noqa: PLC0415
        from matplotlib.colors import LogNorm  # noqa: PLC0415
        from matplotlib.patches import Patch  # noqa: PLC0415
        from matplotlib.ticker import MaxNLocator  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            f"fastlars.plots needs matplotlib, which cannot be imported ({error}); run pip install 'fastlars[plot]' or "
            "pip install matplotlib"
        ) from error

    if ax is None:
        width = 5 + 0.065 * max(map(len, rows)) + 0.03 * min(len(steps), 100)
        inches = _LINE * max(6, min(len(rows), _MOST_LINES))
        _, ax = pyplot.subplots(figsize=(width, 1.2 + inches), layout="constrained")
    else:
        inches = ax.get_window_extent().height / ax.figure.dpi
    colours = colormaps["viridis"].with_extremes(bad=_NO_RATIO, over=_NOT_FINITE)
    scale = LogNorm(min(drawn), max(drawn)) if min(drawn) < max(drawn) else LogNorm(drawn[0] / 2, drawn[0] * 2)
    # NaN gets the colour for a missing ratio, and values above the scale get the colour for one that is not finite
    over = 10 * max(drawn)
    values = [[math.nan if x is None else x if math.isfinite(x) else over for x in row] for row in cells]
    edges = [i - 0.5 for i in range(len(rows) + 1)]
    mesh = ax.pcolormesh(_edges(steps), edges, values, cmap=colours, norm=scale, rasterized=True)
    ax.figure.colorbar(mesh, ax=ax, label="trust ratio", pad=0.02, fraction=0.06, aspect=inches / 0.15)

    every = max(1, math.ceil(len(rows) * _LINE / inches))
    ax.set_yticks(range(0, len(rows), every), rows[::every], fontsize=8, parse_math=False)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.set_xlabel("step")

    legend = []
    if len(known) < len(rows) * len(steps):
        legend.append(Patch(color=_NO_RATIO, label="no ratio: not adapted, or no gradient"))
    if not all(map(math.isfinite, known)):
        legend.append(Patch(color=_NOT_FINITE, label="ratio not finite"))
    if legend:
        ax.legend(
            handles=legend,
            ncols=2,
            frameon=False,
            fontsize=9,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0.3,
        )
    return ax


def _edges(steps: Sequence[int]) -> list[float]:
    """The borders of the columns, half-way between neighbouring steps."""
    between = [(earlier + later) / 2 for earlier, later in itertools.pairwise(steps)]
    first = steps[0] - (between[0] - steps[0] if between else 0.5)
    last = steps[-1] + (steps[-1] - between[-1] if between else 0.5)
    return [first, *between, last]
