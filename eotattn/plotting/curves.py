"""Curves of quality against context length.

Legend: N lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import ArrayLike

from eotattn.checks import check_positive_int, require
from eotattn.plotting.style import line_styles, resolve_axes, to_array

__all__ = ["plot_length_curves"]


def plot_length_curves(
    lengths: ArrayLike,
    curves: Mapping[str, ArrayLike],
    *,
    train_length: int,
    errors: Mapping[str, ArrayLike] | None = None,
    ylabel: str = "bits per byte",
    order: Sequence[str] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw one curve a model against the context length, on a binary logarithmic axis with the training length marked.

    Args:
        lengths: (N,) context lengths, tokens, increasing.
        curves: Name -> (N,) values.
        train_length: Tokens of a training window, where a dashed line stands.
        errors: Name -> (N,) lengths of bars, or (2, N) below and above the curve.
        ylabel: Quantity with its unit.
        order: All names of the figure, for equal styles across panels; see :func:`line_styles`.
        axes: Where to draw; a new figure by default.
    """
    at = to_array("plot_length_curves", "lengths", lengths, num_axes=1)
    increasing = bool((np.diff(at) > 0).all() and at[0] > 0)
    require(increasing, "plot_length_curves", "lengths", "be positive and increasing", lengths, "Sort them")
    check_positive_int("plot_length_curves", "train_length", train_length)
    require(len(curves) > 0, "plot_length_curves", "curves", "hold at least one curve", dict(curves), "Pass one")
    axes = resolve_axes(axes)
    styles = line_styles(list(curves), order)
    for name, values in curves.items():
        curve = to_array("plot_length_curves", f"curves[{name!r}]", values, num_axes=1)
        rule = f"number {len(at)}"
        require(
            len(curve) == len(at), "plot_length_curves", f"curves[{name!r}]", rule, len(curve), "One value a length"
        )
        bars = None if errors is None or name not in errors else np.asarray(errors[name], dtype=np.float64)
        axes.errorbar(at, curve, yerr=bars, capsize=2, label=name, **styles[name])
    axes.axvline(train_length, color="0.45", linestyle="--", linewidth=1, zorder=0)
    axes.annotate(
        " training length", (train_length, 0.97), xycoords=("data", "axes fraction"), fontsize=8, color="0.3", va="top"
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(at)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{length:g}" for length in at])
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize=9)
    return axes
