"""Two qualities of every variant against each other.

Legend: S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from numpy.typing import ArrayLike

from eotattn.checks import require
from eotattn.plotting.style import MARKERS, OKABE_ITO, resolve_axes, to_array

__all__ = ["plot_trade_off"]


def plot_trade_off(
    points: Mapping[str, ArrayLike],
    *,
    labels: Mapping[str, str] | None = None,
    logarithmic: bool = False,
    legend: bool = True,
    axes: Axes | None = None,
) -> Axes:
    """Draw one marker a variant at its mean over seeds, with bars from the lowest to the highest seed.

    Args:
        points: Name -> (S, 2): across and upwards, one row a seed.
        labels: Name -> label in the legend; the name by default.
        logarithmic: Whether the axis upwards is logarithmic.
        legend: Whether to name the variants beside the axes.
        axes: Where to draw; a new figure by default.
    """
    require(len(points) > 0, "plot_trade_off", "points", "hold at least one variant", dict(points), "Pass one")
    axes = resolve_axes(axes)
    colours = list(OKABE_ITO.values())
    for place, (name, seeds) in enumerate(points.items()):
        at = to_array("plot_trade_off", f"points[{name!r}]", seeds, num_axes=2)
        require(
            at.shape[1] == 2, "plot_trade_off", f"points[{name!r}]", "have two columns", at.shape, "Pass (across, up)"
        )
        mean = at.mean(0)
        low, high = mean - at.min(0), at.max(0) - mean
        axes.errorbar(
            mean[0],
            mean[1],
            xerr=[[low[0]], [high[0]]],
            yerr=[[low[1]], [high[1]]],
            color=colours[place % len(colours)],
            marker=MARKERS[(place + place // len(colours)) % len(MARKERS)],
            markersize=7,
            elinewidth=1,
            linestyle="none",
            label=name if labels is None else labels.get(name, name),
        )
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if legend:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return axes
