"""SharedPrior: one log-prior for all heads."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from eotattn.checks import require
from eotattn.priors.base import LogPrior, check_prior
from eotattn.priors.expansion import Expansion
from eotattn.priors.lanes import LaneFactors

__all__ = ["SharedPrior"]


class SharedPrior(LogPrior):
    """All heads have the log-prior of one: log_prior[head] = prior[0].

    Args:
        prior: A prior of one head; stays trainable.
        num_heads: Number of query heads H that share it.

    Source:
        Original.

    Example:
        >>> from eotattn.priors import FourierPrior
        >>> prior = SharedPrior(FourierPrior(1, num_frequencies=4), num_heads=8)
        >>> prior.num_heads, sum(parameter.numel() for parameter in prior.parameters())
        (8, 8)
    """

    def __init__(self, prior: LogPrior, num_heads: int) -> None:
        super().__init__(num_heads)
        check_prior("SharedPrior", "prior", prior)
        alone = prior.num_heads == 1
        require(alone, "SharedPrior", "prior", "have one head", prior.num_heads, "Build it with num_heads=1")
        self.num_coordinates = prior.num_coordinates
        self.prior = prior

    @property
    def has_lanes(self) -> bool:
        """Whether the shared prior has lanes."""
        return self.prior.has_lanes

    def evaluate(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The one log-prior, in nats."""
        return self.prior.evaluate(torch.zeros_like(head), query_position, key_position)

    def factors(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype) -> tuple[LaneFactors, ...]:
        """The factors of the one head, for all."""
        parts = self.prior.factors(query_positions, key_positions, dtype=dtype)
        return tuple(replace(part, query=self._for_all(part.query, -3), row=self._row(part.row)) for part in parts)

    def expansions(self, dtype: torch.dtype) -> tuple[Expansion, ...] | None:
        """The expansions of the one head, for all."""
        parts = self.prior.expansions(dtype)
        if parts is None:
            return None
        return tuple(
            Expansion(part.form, tuple(self._for_all(one, 0) for one in part.coefficients), part.scale * self.num_heads)
            for part in parts
        )

    def check_positions(self, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
        """Raise unless the shared prior understands both positions."""
        self.prior.check_positions(query_positions, key_positions)

    def reset_parameters(self) -> None:
        """Reset the shared prior."""
        self.prior.reset_parameters()

    def _row(self, row: Tensor | None) -> Tensor | None:
        return None if row is None else self._for_all(row, -2)

    def _for_all(self, tensor: Tensor, axis: int) -> Tensor:
        """``tensor`` with its axis of one head as H of them."""
        shape = list(tensor.shape)
        shape[axis] = self.num_heads
        return tensor.expand(shape)
