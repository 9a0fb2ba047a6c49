"""One quality of many variants, a row each.

Legend: S seeds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator
from numpy.typing import ArrayLike

from eotattn.checks import require
from eotattn.plotting.style import OKABE_ITO, resolve_axes, to_array

__all__ = ["plot_ranking"]


def plot_ranking(
    values: Mapping[str, ArrayLike],
    *,
    labels: Mapping[str, str] | None = None,
    highlight: Collection[str] = (),
    reference: str | None = None,
    logarithmic: bool = False,
    axes: Axes | None = None,
) -> Axes:
    """Draw one row a variant from the top: a mark at its mean over seeds, a bar from the lowest to the highest seed.

    Args:
        values: Name -> (S,) values, one a seed.
        labels: Name -> label of the row; the name by default.
        highlight: Names whose rows stand out.
        reference: Name of the variant whose mean a dashed line carries through all rows.
        logarithmic: Whether the axis of values is logarithmic.
        axes: Where to draw; a new figure by default.
    """
    require(len(values) > 0, "plot_ranking", "values", "hold at least one variant", dict(values), "Pass one")
    known = reference is None or reference in values
    require(known, "plot_ranking", "reference", f"be among {list(values)}", reference, "Name one of the rows")
    axes = resolve_axes(axes)
    for row, (name, seeds) in enumerate(values.items()):
        at = to_array("plot_ranking", f"values[{name!r}]", seeds, num_axes=1)
        colour = OKABE_ITO["vermillion" if name in highlight else "blue"]
        axes.plot([at.min(), at.max()], [row, row], color=colour, linewidth=1.4)
        axes.plot([at.mean()], [row], "o", color=colour, markersize=5)
        if name == reference:
            axes.axvline(at.mean(), color="0.45", linestyle="--", linewidth=1, zorder=0)
    names = list(values)
    axes.set_yticks(range(len(names)), [name if labels is None else labels.get(name, name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    return axes
