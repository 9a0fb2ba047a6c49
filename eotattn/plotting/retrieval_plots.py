"""Plots of retrieval: accuracy by context length and depth, and what a prior still lets through at every lag.

Legend: N lengths, D depths, H heads, T lags.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from eotattn.checks import require
from eotattn.plotting.style import OKABE_ITO, resolve_axes, to_array

__all__ = ["plot_depth_grid", "plot_log_prior_by_lag"]


def plot_depth_grid(
    accuracy: ArrayLike,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    train_length: int | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw accuracy as a heat map, lengths across and depths downwards, from 0 (dark) to 1 (light).

    Args:
        accuracy: (N, D), 0 to 1.
        lengths: N context lengths, tokens.
        depths: D depths, 0 (start of the context) to 1.
        train_length: Its column is marked by a line.
        axes: Where to draw; a new figure by default.
    """
    values = to_array("plot_depth_grid", "accuracy", accuracy, num_axes=2)
    expected = (len(lengths), len(depths))
    require(
        values.shape == expected, "plot_depth_grid", "accuracy", f"have shape {expected}", values.shape, "Transpose it"
    )
    axes = resolve_axes(axes)
    axes.imshow(values.T, cmap="cividis", vmin=0.0, vmax=1.0, interpolation="nearest", aspect="auto")
    axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths], fontsize=7)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=7)
    for n, d in np.ndindex(values.shape):
        text = "1" if values[n, d] == 1 else f"{values[n, d]:.2f}".lstrip("0")
        shade = "black" if values[n, d] > 0.5 else "white"
        axes.text(n, d, text, ha="center", va="center", fontsize=6, color=shade)
    if train_length is not None and train_length in lengths:
        axes.axvline(list(lengths).index(train_length) + 0.5, color="white", linestyle="--", linewidth=1)
    return axes


def plot_log_prior_by_lag(
    log_prior: ArrayLike, *, lags: ArrayLike, train_length: int, floor: float = -30.0, axes: Axes | None = None
) -> Axes:
    """Draw the log-prior of one query against the lag, one thin line a head, on a logarithmic axis of lags.

    Args:
        log_prior: (H, T), nats.
        lags: (T,) lags, tokens, at least 0; drawn at lag + 1.
        train_length: Tokens of a training window, where a dashed line stands.
        floor: Lower end of the axis, nats.
        axes: Where to draw; a new figure by default.
    """
    values = to_array("plot_log_prior_by_lag", "log_prior", log_prior, num_axes=2)
    at = to_array("plot_log_prior_by_lag", "lags", lags, num_axes=1)
    rule = f"number {values.shape[1]}"
    require(len(at) == values.shape[1], "plot_log_prior_by_lag", "lags", rule, len(at), "One a column")
    axes = resolve_axes(axes)
    colours = list(OKABE_ITO.values())
    for h, row in enumerate(values):
        axes.plot(at + 1, row, color=colours[h % len(colours)], linewidth=0.9, alpha=0.8)
    axes.axvline(train_length, color="0.45", linestyle="--", linewidth=1, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_ylim(floor, 1.5)
    axes.set_xlabel("lag + 1 (tokens)")
    axes.set_ylabel("log-prior (nats)")
    return axes


def _short(length: int) -> str:
    return f"{length / 1024:g}k" if length >= 1024 else str(length)
