"""Plots of theorems: what was measured against its bound, and one side of an identity against the other.

Legend: N points of a line.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from eotattn.checks import check_choice, require
from eotattn.plotting.style import OKABE_ITO, line_styles, resolve_axes, to_array

__all__ = ["plot_identity", "plot_measured_and_bound"]


def plot_measured_and_bound(
    x: ArrayLike,
    measured: Mapping[str, ArrayLike],
    bounds: Mapping[str, ArrayLike] | None = None,
    *,
    labels: tuple[str, str],
    scales: tuple[str, str] = ("linear", "linear"),
    bound_label: str = "bound",
    marks: str = "lines",
    axes: Axes | None = None,
) -> Axes:
    """Draw measured lines or points, each with its bound dashed in the same colour.

    Args:
        x: (N,) abscissae.
        measured: Name -> (N,) values.
        bounds: Name out of ``measured`` -> (N,) bound.
        labels: Of the two axes, with units.
        scales: Of the two axes, ``"linear"`` or ``"log"``.
        bound_label: What the dashed lines are called.
        marks: ``"points"`` where neighbours are unrelated problems, so that no line belongs between them.
        axes: Where to draw; a new figure by default.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no line, a length differs from that of ``x``, or a bound has no line.
    """
    owner, bounds = "plot_measured_and_bound", {} if bounds is None else bounds
    check_choice(owner, "marks", marks, ("lines", "points"))
    axes = resolve_axes(axes)
    require(len(measured) > 0, owner, "measured", "hold at least one line", measured, "Pass one")
    strangers = [name for name in bounds if name not in measured]
    require(not strangers, owner, "bounds", "belong to measured lines", strangers, "Use the same names")
    places = to_array(owner, "x", x, num_axes=1)
    styles = line_styles(list(measured))
    for kind, lines in (("measured", measured), ("bounds", bounds)):
        for name, values in lines.items():
            line = to_array(owner, kind, values, num_axes=1)
            fits = len(line) == len(places)
            require(fits, owner, kind, f"have {len(places)} points", f"{len(line)} in {name!r}", "Match x")
            style = styles[name] if kind == "measured" else {"color": styles[name]["color"], "linestyle": "--"}
            if marks == "points" and kind == "measured":
                style = {"color": styles[name]["color"], "linestyle": "none", "marker": "."}
            axes.plot(places, line, label=name if kind == "measured" else None, **style)
    if bounds:
        axes.plot([], [], color="0.4", linestyle="--", label=bound_label)
    axes.set(xscale=scales[0], yscale=scales[1], xlabel=labels[0], ylabel=labels[1])
    axes.legend(frameon=False, fontsize=8)
    return axes


def plot_identity(left: ArrayLike, right: ArrayLike, *, labels: tuple[str, str], axes: Axes | None = None) -> Axes:
    """Draw one side of an identity against the other, over the diagonal.

    Args:
        left: (N,) one side.
        right: (N,) the other.
        labels: Of the two sides, with units.
        axes: Where to draw; a new figure by default.

    Returns:
        The axes.

    Raises:
        ValueError: If the sides differ in length.
    """
    owner = "plot_identity"
    axes = resolve_axes(axes)
    first, second = to_array(owner, "left", left, num_axes=1), to_array(owner, "right", right, num_axes=1)
    fits = len(first) == len(second)
    require(fits, owner, "right", f"have {len(first)} points", f"{len(second)}", "Pass both sides of one identity")
    ends = np.array([min(first.min(), second.min()), max(first.max(), second.max())])
    axes.plot(ends, ends, color="0.6", linewidth=1, zorder=0)
    axes.scatter(first, second, s=14, color=OKABE_ITO["blue"])
    axes.set(xlabel=labels[0], ylabel=labels[1])
    return axes
