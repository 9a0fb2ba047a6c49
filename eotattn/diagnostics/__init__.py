"""Diagnostics: attention statistics in, small reports out."""

from eotattn.diagnostics.grid_prior import GridPriorReport, fit_grid_prior
from eotattn.diagnostics.grid_statistics import GridStatistics
from eotattn.diagnostics.heads import HeadReport, head_report
from eotattn.diagnostics.implicit_prior import ImplicitPriorReport, fit_prior
from eotattn.diagnostics.sinks import SinkMassReport, score_range, sink_mass, sink_mass_by_score_range
from eotattn.diagnostics.strongest_keys import StrongestKeys, strongest_keys
from eotattn.diagnostics.token_statistics import TokenStatistics
from eotattn.diagnostics.top_keys import TopKeys
from eotattn.diagnostics.value_statistics import ValueStatistics

__all__ = [
    "GridPriorReport",
    "GridStatistics",
    "HeadReport",
    "ImplicitPriorReport",
    "SinkMassReport",
    "StrongestKeys",
    "TokenStatistics",
    "TopKeys",
    "ValueStatistics",
    "fit_grid_prior",
    "fit_prior",
    "head_report",
    "score_range",
    "sink_mass",
    "sink_mass_by_score_range",
    "strongest_keys",
]
