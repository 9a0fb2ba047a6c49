"""Plots of sinks.

Legend: M bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba
from numpy.typing import ArrayLike

from eotattn.checks import require
from eotattn.diagnostics import SinkMassReport
from eotattn.plotting.style import line_styles, resolve_axes, to_array

__all__ = ["plot_sink_heads", "plot_sink_mass"]


def plot_sink_mass(
    reports: Mapping[str, SinkMassReport],
    *,
    uniform_mass: float | None = None,
    order: Sequence[str] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw the mean sink mass against the mean signal strength of every bin, with two standard errors.

    Args:
        reports: Name -> report of :func:`eotattn.diagnostics.sink_mass_by_score_range`.
        uniform_mass: Mass that uniform attention would give the first token, for a dotted line, in [0, 1].
        order: All names of the figure, for equal styles across panels; see :func:`line_styles`.
        axes: Where to draw; a new figure by default.
    """
    axes = resolve_axes(axes)
    require(len(reports) > 0, "plot_sink_mass", "reports", "hold at least one report", reports, "Pass one")
    styles = line_styles(list(reports), order)
    for name, report in reports.items():
        filled = report.counts > 0
        bars = 2 * np.nan_to_num(report.standard_error[filled])
        axes.errorbar(
            report.mean_score_range[filled],
            report.mean_sink_mass[filled],
            yerr=bars,
            capsize=2,
            label=name,
            **styles[name],
        )
    if uniform_mass is not None:
        axes.axhline(uniform_mass, color="0.45", linestyle=":", linewidth=1.2, label="uniform attention")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("signal strength ω: range of content scores (nats)")
    axes.set_ylabel("mass on the first token")
    axes.legend(frameon=False, fontsize=9)
    return axes


def plot_sink_heads(
    mass: ArrayLike,
    prior_share: ArrayLike,
    *,
    threshold: float,
    legend: bool = False,
    axes: Axes | None = None,
) -> Axes:
    """Draw every head of a network as a disc: its area is the mass on the first token, its colour what makes it.

    Args:
        mass: (A, H) mean mass on the first token, in [0, 1].
        prior_share: (A, H) share of the log-prior in the margin, in [0, 1]: 0 is content, drawn orange, 1 blue; NaN
            where there is no margin to share, drawn grey.
        threshold: Heads with more mass than this are sinks and have a rim; the others are drawn pale.
        legend: Whether a colour bar stands beside the heads.
        axes: Where to draw; a new figure by default.
    """
    axes = resolve_axes(axes)
    masses = to_array("plot_sink_heads", "mass", mass, num_axes=2)
    shares = to_array("plot_sink_heads", "prior_share", prior_share, num_axes=2)
    blocks, heads = masses.shape
    colours = LinearSegmentedColormap.from_list("share", ["#8C510A", "#DDDDDD", "#01665E"])  # no method's colours
    block, head = np.meshgrid(np.arange(blocks), np.arange(heads), indexing="ij")
    is_sink = masses > threshold
    size = 110 * masses
    discs = ScalarMappable(Normalize(0, 1), colours)
    colour = np.where(np.isnan(shares)[..., None], to_rgba("0.75"), discs.to_rgba(np.nan_to_num(shares)))
    colour[..., 3] = np.where(is_sink, 1.0, 0.4)
    rims = np.where(is_sink, 0.7, 0.0).ravel().tolist()
    axes.scatter(head, block, s=size, facecolors=colour.reshape(-1, 4), edgecolors="0.15", linewidths=rims)
    axes.set_xlim(-0.7, heads - 0.3)
    axes.set_ylim(-0.7, blocks - 0.3)
    axes.set_xticks(range(heads), [])
    axes.set_yticks([0, blocks - 1], ["1", str(blocks)])
    axes.tick_params(length=0)
    axes.set_xlabel("heads (sinks have a rim)", fontsize=8)
    axes.set_ylabel("block", fontsize=8)
    if legend:
        bar = axes.figure.colorbar(discs, ax=axes, ticks=[0, 1], fraction=0.08)
        bar.ax.set_yticklabels(["content", "prior"], fontsize=7)
    return axes
