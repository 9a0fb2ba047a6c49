"""eotattn: an entropic optimal transport analysis toolkit for attention."""

from typing import TYPE_CHECKING, Any

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
    split_parameters,
)
from eotattn.transport import TransportProblem, TransportSolution, solve

if TYPE_CHECKING:
    from eotattn.analysis import analyze as analyze

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
    "split_parameters",
]


def __getattr__(name: str) -> Any:
    """Import ``analyze`` when it is first used: it needs matplotlib."""
    if name == "analyze":
        from eotattn.analysis import analyze

        return analyze
    raise AttributeError(f"module 'eotattn' has no attribute {name!r}")
