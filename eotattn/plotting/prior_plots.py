"""Plots of log-priors: the key-only part, the relative part, the row-centred sum, the induced prior; grids.

Legend: H heads, L tokens, T lags, h rows, w columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, TwoSlopeNorm
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from eotattn.checks import require
from eotattn.plotting.style import add_legend, head_style, resolve_axes, to_array

__all__ = [
    "plot_causal_prior",
    "plot_cell_map",
    "plot_key_only",
    "plot_lag_map",
    "plot_relative",
    "plot_row_centred",
]

#: What maps on a grid show.
DEVIATION = "log-prior, deviation from its mean (nats)"


def plot_key_only(
    key_only: ArrayLike,
    *,
    positions: ArrayLike | None = None,
    labels: Sequence[str] | None = None,
    train_length: int | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw the key-only part u(j) against the key's position, one line a head.

    Args:
        key_only: (H, L), nats.
        positions: (L,) positions, tokens; 0 ... L - 1 by default.
        labels: H names for the legend; without them there is no legend.
        train_length: Position of a mark, tokens.
        axes: Where to draw; a new figure by default.
    """
    values = to_array("plot_key_only", "key_only", key_only, num_axes=2)
    axes = _lines("plot_key_only", values, positions, labels, axes)
    if train_length is not None:
        axes.axvline(train_length, color="0.45", linestyle="--", linewidth=1)
        note = f" training length\n {train_length}"
        axes.annotate(note, (train_length, 0.02), xycoords=("data", "axes fraction"), fontsize=8, color="0.3")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("key position j (tokens)")
    axes.set_ylabel("key-only log-prior u(j) (nats)")
    return axes


def plot_relative(
    relative: ArrayLike,
    *,
    lags: ArrayLike | None = None,
    labels: Sequence[str] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw the relative part kappa(t) against the lag, one line a head.

    Args:
        relative: (H, T), nats.
        lags: (T,) lags, tokens; 0 ... T - 1 by default.
        labels: H names for the legend; without them there is no legend.
        axes: Where to draw; a new figure by default.
    """
    values = to_array("plot_relative", "relative", relative, num_axes=2)
    axes = _lines("plot_relative", values, lags, labels, axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("lag t (tokens)")
    axes.set_ylabel("relative log-prior κ(t) (nats)")
    return axes


def plot_row_centred(log_prior: ArrayLike, *, axes: Axes | None = None) -> Axes:
    """Draw one head's row-centred log-prior as a heat map, zero in white.

    Args:
        log_prior: (Q, K), nats, rows with mean zero; -inf or NaN where a key is inadmissible (left blank).
        axes: Where to draw; a new figure by default.
    """
    values = to_array("plot_row_centred", "log_prior", log_prior, num_axes=2)
    return _diverging("plot_row_centred", "log_prior", values, "row-centred log-prior (nats)", axes)


def plot_causal_prior(weights: ArrayLike, *, floor: float = 1e-3, axes: Axes | None = None) -> Axes:
    """Draw one head's induced prior as a heat map with a logarithmic colour.

    Args:
        weights: (Q, K), rows sum to one; zero where a key is inadmissible (left blank).
        floor: Probabilities below are drawn in the lowest colour.
        axes: Where to draw; a new figure by default.
    """
    values = to_array("plot_causal_prior", "weights", weights, num_axes=2)
    rule = "lie in [0, 1]"
    inside = bool((values >= 0).all() and (values <= 1 + 1e-6).all())
    extremes = f"values from {values.min()} to {values.max()}"
    require(inside, "plot_causal_prior", "weights", rule, extremes, "Apply softmax first")
    shown = np.ma.masked_equal(values, 0.0)
    axes = resolve_axes(axes)
    image = axes.imshow(
        np.ma.clip(shown, floor, 1.0), cmap="cividis", norm=LogNorm(floor, 1.0), interpolation="nearest", aspect="equal"
    )
    return _with_bar(axes, image, "probability")


def plot_lag_map(relative: ArrayLike, *, axes: Axes | None = None) -> Axes:
    """Draw one head's relative part on a grid against the lags of both axes, centred at its mean.

    Args:
        relative: (2 h - 1, 2 w - 1), nats, lags query - key from -(h - 1) and -(w - 1).
        axes: Where to draw; a new figure by default.
    """
    values = to_array("plot_lag_map", "relative", relative, num_axes=2)
    odd = values.shape[0] % 2 == 1 and values.shape[1] % 2 == 1
    require(odd, "plot_lag_map", "relative", "have odd numbers of lags", values.shape, "Pass all lags of a grid")
    rows, columns = (size // 2 + 0.5 for size in values.shape)
    extent = (-columns, columns, rows, -rows)
    axes = _diverging("plot_lag_map", "relative", _deviation(values), DEVIATION, axes, extent)
    axes.set_xlabel("column lag (cells)")
    axes.set_ylabel("row lag (cells)")
    return axes


def plot_cell_map(key_only: ArrayLike, *, axes: Axes | None = None) -> Axes:
    """Draw one head's key-only part on a grid, centred at its mean.

    Args:
        key_only: (h, w), nats.
        axes: Where to draw; a new figure by default.
    """
    values = to_array("plot_cell_map", "key_only", key_only, num_axes=2)
    axes = _diverging("plot_cell_map", "key_only", _deviation(values), DEVIATION, axes)
    axes.set_xlabel("column of the key")
    axes.set_ylabel("row of the key")
    return axes


def _deviation(values: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values)]
    return values - finite.mean() if finite.size else values


def _diverging(
    owner: str,
    argument: str,
    values: np.ndarray,
    label: str,
    axes: Axes | None,
    extent: tuple[float, float, float, float] | None = None,
) -> Axes:
    """A heat map with zero in white, blank where a value is not finite."""
    shown = np.ma.masked_invalid(values)
    require(shown.count() > 0, owner, argument, "hold a finite value", "none", "Check the mask, or the fit")
    extreme = max(float(np.abs(shown).max()), 1e-9)
    axes = resolve_axes(axes)
    norm = TwoSlopeNorm(0.0, -extreme, extreme)
    image = axes.imshow(shown, cmap="RdBu_r", norm=norm, interpolation="nearest", aspect="equal", extent=extent)
    return _with_bar(axes, image, label)


def _lines(
    owner: str,
    values: np.ndarray,
    positions: ArrayLike | None,
    labels: Sequence[str] | None,
    axes: Axes | None,
) -> Axes:
    heads, length = values.shape
    at = np.arange(length) if positions is None else to_array(owner, "positions", positions, num_axes=1)
    require(len(at) == length, owner, "the positions", f"number {length}", len(at), "One position a value")
    named = labels is None or len(labels) == heads
    require(named, owner, "labels", f"number {heads}", labels, "One label a head")
    axes = resolve_axes(axes)
    marker = "o" if length <= 64 else None
    axes.axhline(0, color="0.75", linewidth=0.8, zorder=0)
    for h in range(heads):
        label = None if labels is None else labels[h]
        axes.plot(at, values[h], marker=marker, markersize=3.5, linewidth=1.4, label=label, **head_style(h))
    if labels is not None:
        add_legend(axes, heads)
    return axes


def _with_bar(axes: Axes, image: object, label: str) -> Axes:
    axes.figure.colorbar(image, ax=axes, label=label, shrink=0.85)  # type: ignore[arg-type]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("key position j")
    axes.set_ylabel("query position i")
    return axes
