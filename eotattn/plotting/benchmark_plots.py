"""Benchmarks drawn: times as ratios to a baseline, errors against length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import ArrayLike

from eotattn.checks import require
from eotattn.plotting.style import OKABE_ITO, line_styles, resolve_axes, to_array

__all__ = ["plot_errors_by_length", "plot_time_ratios"]

#: Ratios that ticks stand at, in every power of ten.
RATIOS = (1.0, 1.5, 2.0, 3.0, 5.0)


def plot_time_ratios(
    names: Sequence[str],
    ratios: ArrayLike,
    *,
    bound: float | None = None,
    highlight: str = "eotattn",
    axes: Axes | None = None,
) -> Axes:
    """Draw one point a candidate: its time over the baseline's, on a logarithmic axis, with a line from one.

    Args:
        names: (N,) candidates, from top to bottom.
        ratios: (N,) times over the baseline's, positive.
        bound: Where to draw a dashed line.
        highlight: Candidates whose name begins so are drawn in another colour, which the legend names.
        axes: Where to draw; a new figure by default.
    """
    values = to_array("plot_time_ratios", "ratios", ratios, num_axes=1)
    fits = len(names) == values.shape[0]
    require(fits, "plot_time_ratios", "names", f"hold {values.shape[0]} names", list(names), "One name a ratio")
    require(bool((values > 0).all()), "plot_time_ratios", "ratios", "be positive", ratios, "Drop failed candidates")
    axes = resolve_axes(axes)
    places = np.arange(len(names))[::-1]
    highlighted = np.array([name.startswith(highlight) for name in names])
    for label, colour, shown in ((highlight, "vermillion", highlighted), ("others", "blue", ~highlighted)):
        if shown.any():
            axes.scatter(values[shown], places[shown], s=30, color=OKABE_ITO[colour], label=label, zorder=3)
            axes.hlines(places[shown], 1.0, values[shown], color=OKABE_ITO[colour], linewidth=1.5)
    for place, value in zip(places, values, strict=True):
        at = max(value, 1.0), place
        axes.annotate(f"{value:.2f}", at, (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, values.min() * 0.8), max(values.max(), 1.0) * 1.5)
    axes.xaxis.set_major_locator(LogLocator(subs=RATIOS))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1.0, color="0.3", linewidth=0.8)
    if bound is not None:
        axes.axvline(bound, color="0.3", linewidth=0.8, linestyle="--")
    axes.set_xlabel("time over the baseline's")
    if highlighted.any() and not highlighted.all():
        axes.legend(frameon=False, fontsize=8)
    return axes


def plot_errors_by_length(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]], *, ylabel: str, axes: Axes | None = None
) -> Axes:
    """Draw one curve a method: its error against the context length, both axes logarithmic.

    Args:
        curves: Name -> (lengths in tokens, errors), each (N,).
        ylabel: What the error is, with its unit.
        axes: Where to draw; a new figure by default.
    """
    require(len(curves) > 0, "plot_errors_by_length", "curves", "hold at least one curve", dict(curves), "Pass one")
    axes = resolve_axes(axes)
    styles = line_styles(list(curves))
    for name, (lengths, errors) in curves.items():
        at = to_array("plot_errors_by_length", "lengths", lengths, num_axes=1)
        values = to_array("plot_errors_by_length", "errors", errors, num_axes=1)
        axes.plot(at, values, label=name, **styles[name])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize=8)
    return axes
