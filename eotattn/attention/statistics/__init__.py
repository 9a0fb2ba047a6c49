"""Statistics of the rows and columns of attention, without an L x L tensor: by kernel sweeps or by blocks of rows."""

from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.attention.statistics.streaming import AttentionStatistics, row_statistics, weight_statistics

__all__ = ["AttentionStatistics", "SequenceStatistics", "row_statistics", "weight_statistics"]
