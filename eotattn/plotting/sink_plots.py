"""Plots of sinks.

Legend: M bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from eotattn.checks import require
from eotattn.diagnostics import SinkMassReport
from eotattn.plotting.style import line_styles, resolve_axes

__all__ = ["plot_sink_mass"]


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
