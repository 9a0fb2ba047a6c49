"""Plots of all heads of a model: grids, curves over layers, profiles over lags, margins by their parts.

Legend: A layers, H heads, T lags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from eotattn.checks import require
from eotattn.plotting.style import (
    OKABE_ITO,
    add_legend,
    head_style,
    line_styles,
    number_ticks,
    resolve_axes,
    to_array,
)

__all__ = ["plot_head_grid", "plot_lag_profile", "plot_layer_curves", "plot_margin_split"]


def plot_head_grid(
    values: ArrayLike,
    *,
    label: str,
    low: float | None = None,
    high: float | None = None,
    numbers: tuple[Sequence[int], Sequence[int]] | None = None,
    hatched: NDArray[np.bool_] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw one number a head as a grid: layers downwards, heads across, missing heads blank.

    Args:
        values: (A, H); NaN where a layer has no such head.
        label: Quantity with its unit, for the colour bar.
        low: Value of the lowest colour; the smallest by default.
        high: Value of the highest colour; the largest by default.
        numbers: A numbers of layers and H of heads for the ticks; both count from zero by default.
        hatched: (A, H) heads whose number is not to be read, hatched in grey instead; none by default.
        axes: Where to draw; a new figure by default.
    """
    grid = to_array("plot_head_grid", "values", values, num_axes=2)
    shown = np.ma.masked_invalid(grid)
    require(shown.count() > 0, "plot_head_grid", "values", "hold a finite value", "none", "Check the statistics")
    left_out = np.zeros(grid.shape, dtype=bool) if hatched is None else np.asarray(hatched, dtype=bool)
    rule = f"have shape {grid.shape}"
    require(left_out.shape == grid.shape, "plot_head_grid", "hatched", rule, left_out.shape, "One entry a head")
    shown[left_out] = np.ma.masked
    axes = resolve_axes(axes)
    image = axes.imshow(shown, cmap="cividis", vmin=low, vmax=high, interpolation="nearest", aspect="auto")
    axes.figure.colorbar(image, ax=axes, label=label, shrink=0.85)
    for a, h in np.argwhere(left_out):
        axes.add_patch(Rectangle((h - 0.5, a - 0.5), 1, 1, facecolor="0.92", edgecolor="0.55", hatch="////", lw=0))
    layers, heads = (None, None) if numbers is None else numbers
    number_ticks(axes.xaxis, heads)
    number_ticks(axes.yaxis, layers)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    return axes


def plot_layer_curves(
    curves: Mapping[str, ArrayLike],
    *,
    ylabel: str,
    intervals: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    layers: Sequence[int] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw one curve a quantity over the layers.

    Args:
        curves: Name -> (A,) values.
        ylabel: Quantity with its unit.
        intervals: Name -> (low, high), each (A,), drawn as a band.
        layers: A numbers for the ticks; 0 to A - 1 by default.
        axes: Where to draw; a new figure by default.
    """
    require(len(curves) > 0, "plot_layer_curves", "curves", "hold at least one curve", dict(curves), "Pass one")
    axes = resolve_axes(axes)
    styles = line_styles(list(curves))
    for name, values in curves.items():
        curve = to_array("plot_layer_curves", f"curves[{name!r}]", values, num_axes=1)
        axes.plot(np.arange(len(curve)), curve, label=name, **styles[name])
        if intervals is not None and name in intervals:
            low, high = (np.asarray(side, dtype=np.float64) for side in intervals[name])
            axes.fill_between(np.arange(len(curve)), low, high, color=styles[name]["color"], alpha=0.2, linewidth=0)
    number_ticks(axes.xaxis, layers)
    axes.set_xlabel("layer")
    axes.set_ylabel(ylabel)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    return axes


def plot_lag_profile(
    profile: ArrayLike, *, floor: float = 1e-5, labels: Sequence[str] | None = None, axes: Axes | None = None
) -> Axes:
    """Draw the weight by lag of every head of a layer, on a logarithmic axis.

    Args:
        profile: (H, T) weight by lag for lags -(T - 1) / 2 to (T - 1) / 2, T odd.
        floor: Smaller weights are drawn here.
        labels: H names for the legend; without them there is no legend.
        axes: Where to draw; a new figure by default.
    """
    values = to_array("plot_lag_profile", "profile", profile, num_axes=2)
    rule = "have an odd number of lags"
    require(values.shape[1] % 2 == 1, "plot_lag_profile", "profile", rule, values.shape, "Pass lags -M to M")
    reach = values.shape[1] // 2
    lags = np.arange(-reach, reach + 1)
    used = values.sum(0) > 0
    require(bool(used.any()), "plot_lag_profile", "profile", "hold weight", "none", "Run the model first")
    named = labels is None or len(labels) == len(values)
    require(named, "plot_lag_profile", "labels", f"number {len(values)}", labels, "One label a head")
    axes = resolve_axes(axes)
    for h, row in enumerate(values):
        label = None if labels is None else labels[h]
        axes.plot(lags[used], np.maximum(row[used], floor), linewidth=0.9, label=label, **head_style(h))
    if labels is not None:
        add_legend(axes, len(labels))
    axes.set_yscale("log")
    axes.set_xlabel("lag: query - key (tokens)")
    axes.set_ylabel("weight")
    return axes


def plot_margin_split(
    content: ArrayLike, prior: ArrayLike, *, layers: Sequence[int] | None = None, axes: Axes | None = None
) -> Axes:
    """Draw the content part and the prior part of the mean sink margin of every head as stacked bars.

    A few bars far longer than all others are cut at the edge, and their ends written there.

    Args:
        content: (A, H), nats; NaN where a layer has no such head.
        prior: (A, H), nats.
        layers: A numbers for the ticks; 0 to A - 1 by default.
        axes: Where to draw; a new figure by default.
    """
    parts = {"content": content, "prior": prior}
    arrays = {name: to_array("plot_margin_split", name, values, num_axes=2) for name, values in parts.items()}
    same = arrays["content"].shape == arrays["prior"].shape
    require(
        same, "plot_margin_split", "prior", f"have shape {arrays['content'].shape}", arrays["prior"].shape, "Match them"
    )
    axes = resolve_axes(axes)
    axes.use_sticky_edges = False  # the highest bar has room above it
    heads = arrays["content"].shape[1]
    at = np.arange(arrays["content"].size)
    above, below = np.zeros(at.size), np.zeros(at.size)
    for colour, (name, values) in zip(("blue", "orange"), arrays.items(), strict=True):
        flat = np.nan_to_num(values.ravel())
        base = np.where(flat >= 0, above, below)
        axes.bar(at, flat, bottom=base, width=0.9, color=OKABE_ITO[colour], label=name)
        above, below = above + np.maximum(flat, 0), below + np.minimum(flat, 0)
    axes.plot(at, above + below, linestyle="none", marker="_", color="black", markersize=4, label="margin")
    axes.axhline(0, color="0.4", linewidth=0.8)
    for layer in range(1, arrays["content"].shape[0]):
        axes.axvline(layer * heads - 0.5, color="0.85", linewidth=0.8, zorder=0)
    numbers = range(arrays["content"].shape[0]) if layers is None else layers
    places = np.arange(len(numbers)) * heads + (heads - 1) / 2
    step = -(-len(numbers) // NAMED_LAYERS)
    axes.set_xticks(places[::step], [str(number) for number in numbers][::step])
    _fit_bars(axes, below, above)
    axes.set_xlabel("layer (one bar a head)")
    axes.set_ylabel("mean sink margin (nats)")
    axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")
    return axes


#: Bars longer than this many times the 95% quantile of all ends are cut.
CUT = 2.0
#: Layers that have a name below the bars, at most.
NAMED_LAYERS = 16


def _fit_bars(axes: Axes, below: NDArray[np.float64], above: NDArray[np.float64]) -> None:
    """Choose limits that a few long bars do not set; say where those end."""
    for ends, sign in ((above, 1), (below, -1)):
        limit = CUT * max(float(np.quantile(np.maximum(above, -below), 0.95)), 1e-12)
        longest = float(np.abs(ends).max())
        if longest <= limit:
            continue
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom if sign > 0 else -limit, limit if sign > 0 else top)
        inward = "top" if sign > 0 else "bottom"
        for at in np.flatnonzero(np.abs(ends) > limit):
            axes.text(float(at), sign * limit, f"{ends[at]:.3g}", fontsize=7, ha="center", va=inward)
