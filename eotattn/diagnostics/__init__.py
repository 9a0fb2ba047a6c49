"""Diagnostics: attention statistics in, small reports out."""

from eotattn.diagnostics.heads import HeadReport, head_report
from eotattn.diagnostics.implicit_prior import ImplicitPriorReport, fit_prior
from eotattn.diagnostics.sinks import SinkMassReport, score_range, sink_mass, sink_mass_by_score_range

__all__ = [
    "HeadReport",
    "ImplicitPriorReport",
    "SinkMassReport",
    "fit_prior",
    "head_report",
    "score_range",
    "sink_mass",
    "sink_mass_by_score_range",
]
