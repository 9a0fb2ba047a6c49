"""A prior as naive lanes carry it: every factor one bfloat16 number."""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.checks import require
from eotattn.priors import LogPrior
from eotattn.priors.lanes import LaneFactors

__all__ = ["NarrowLanesPrior"]


class NarrowLanesPrior(LogPrior):
    """log_prior = <bfloat16(query factors), bfloat16(key factors)> of another prior.

    This is what becomes of a prior whose lanes are written in bfloat16 as they are, instead of being split: beyond
    position 256 positions are multiples of two, beyond 512 of four. It is so in every dtype and on every device, so
    that training and evaluation can be compared with those of the exact prior.

    Args:
        prior: A prior with lanes; stays trainable.

    Source:
        Original, after the lanes of the package ``goat-attention``, which under bfloat16 are single numbers too.

    Example:
        >>> from eotattn.priors import RecencyPrior
        >>> prior, at = RecencyPrior(2).freeze(), torch.tensor([1001, 1003])
        >>> [float(form.dense(at, at)[0, 1].diff()) for form in (prior, NarrowLanesPrior(prior))]
        [0.125, 0.25]
    """

    def __init__(self, prior: LogPrior) -> None:
        super().__init__(prior.num_heads)
        remedy = "Pass a prior with lanes"
        require(prior.has_lanes, "NarrowLanesPrior", "prior", "have lanes", type(prior).__name__, remedy)
        self.num_coordinates = prior.num_coordinates
        self.prior = prior

    def evaluate(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """Refuse: roundings belong to factors, and single pairs have none."""
        raise NotImplementedError("NarrowLanesPrior.evaluate: lanes define it. Use dense, or backend='sdpa'.")

    def dense(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The products of the rounded factors, (..., H, Q, K), nats."""
        self.check_positions(query_positions, key_positions)
        factors = self.factors(query_positions, key_positions, dtype=dtype)
        return torch.stack([part.query.to(dtype) @ part.key.to(dtype).mT for part in factors]).sum(0)

    def factors(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype) -> tuple[LaneFactors, ...]:
        """The factors of the other prior, one a lane, rounded to bfloat16."""
        parts = self.prior.factors(query_positions, key_positions, dtype=torch.float32)
        narrow = ((part.query.bfloat16().float(), part.key.bfloat16().float()) for part in parts)
        return tuple(LaneFactors(query, key, exact="both") for query, key in narrow)

    def reset_parameters(self) -> None:
        """Reset the other prior."""
        self.prior.reset_parameters()
