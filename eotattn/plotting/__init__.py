"""Plots: arrays in, matplotlib Axes out. Importing this room imports matplotlib; importing ``eotattn`` does not."""

from eotattn.plotting.curves import plot_length_curves
from eotattn.plotting.prior_plots import (
    plot_causal_prior,
    plot_cell_map,
    plot_key_only,
    plot_lag_map,
    plot_relative,
    plot_row_centred,
)
from eotattn.plotting.ranking import plot_ranking
from eotattn.plotting.retrieval_plots import plot_depth_grid, plot_log_prior_by_lag
from eotattn.plotting.sink_plots import plot_sink_heads, plot_sink_mass
from eotattn.plotting.style import OKABE_ITO, line_styles, mosaic, panels, resolve_axes, shade_lines, title_panels
from eotattn.plotting.theory_plots import plot_identity, plot_measured_and_bound

__all__ = [
    "OKABE_ITO",
    "line_styles",
    "mosaic",
    "panels",
    "plot_causal_prior",
    "plot_cell_map",
    "plot_depth_grid",
    "plot_identity",
    "plot_key_only",
    "plot_lag_map",
    "plot_length_curves",
    "plot_log_prior_by_lag",
    "plot_measured_and_bound",
    "plot_ranking",
    "plot_relative",
    "plot_row_centred",
    "plot_sink_heads",
    "plot_sink_mass",
    "resolve_axes",
    "shade_lines",
    "title_panels",
]
