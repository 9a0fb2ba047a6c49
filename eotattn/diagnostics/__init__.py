"""Diagnostics: attention statistics in, small reports out."""

from eotattn.diagnostics.sinks import SinkMassReport, score_range, sink_mass, sink_mass_by_score_range

__all__ = ["SinkMassReport", "score_range", "sink_mass", "sink_mass_by_score_range"]
