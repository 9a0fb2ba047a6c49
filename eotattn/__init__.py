"""eotattn: an entropic optimal transport analysis toolkit for attention."""

from eotattn.attention import GoatAttention, PriorAttention, Rotary, prior_attention
from eotattn.priors import (
    ClassTokenPrior,
    DensePrior,
    FourierPrior,
    GridPrior,
    LogPrior,
    RecencyPrior,
    SinkPrior,
    TablePrior,
    goat_prior,
    grid_positions,
)
from eotattn.transport import TransportProblem, TransportSolution, solve

__all__ = [
    "ClassTokenPrior",
    "DensePrior",
    "FourierPrior",
    "GoatAttention",
    "GridPrior",
    "LogPrior",
    "PriorAttention",
    "RecencyPrior",
    "Rotary",
    "SinkPrior",
    "TablePrior",
    "TransportProblem",
    "TransportSolution",
    "goat_prior",
    "grid_positions",
    "prior_attention",
    "solve",
]
