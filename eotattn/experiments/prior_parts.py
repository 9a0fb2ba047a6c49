"""A GOAT log-prior split into what the paper's figures show: a key-only part, a relative part, and their sum.

Legend: H heads, L tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.checks import check_positive_int, require
from eotattn.priors import LogPrior, SinkPrior, SumPrior

__all__ = ["PriorParts", "key_only_part", "split_prior"]


@dataclass(frozen=True, eq=False)
class PriorParts:
    """A causal log-prior K_ij = relative(i - j) + key_only(j) on positions 0 ... L - 1, nats, float64.

    Attributes:
        key_only: (H, L) u(j).
        relative: (H, L) kappa(t) at the lags t = 0 ... L - 1, recency included.
        total: (H, L, L) the log-prior as attention adds it, -inf above the diagonal.
    """

    key_only: Tensor
    relative: Tensor
    total: Tensor

    def without_key_slope(self) -> PriorParts:
        """The same log-prior in the gauge in which u(j) has no linear trend over the keys after the first.

        Adding c t to the relative part and c j to the key-only part adds c i to row i, which softmax cannot see. The
        data say nothing about c, then, and this convention gives every linear trend (an ALiBi slope too) to the lag.
        """
        length = self.key_only.shape[-1]
        require(length >= 3, "PriorParts", "the length", "be at least 3 to fit a line", length, "Split a longer window")
        position = torch.arange(length, dtype=torch.float64)
        centred = position[1:] - position[1:].mean()
        slope = (self.key_only[:, 1:] * centred).sum(-1, keepdim=True) / centred.square().sum()
        row = slope[..., None] * position[:, None]
        return PriorParts(self.key_only - slope * position, self.relative - slope * position, self.total - row)


@torch.no_grad()
def key_only_part(prior: LogPrior | None, length: int) -> Tensor | None:
    """u(j) of a prior that holds a :class:`eotattn.priors.SinkPrior`, as it is parametrised.

    Returns:
        (H, L) float64, nats; None where there is no such part.
    """
    parts = prior.parts if isinstance(prior, SumPrior) else (prior,)
    found = [part for part in parts if isinstance(part, SinkPrior)]
    if not found:
        return None
    positions, zero = _positions(found[0], length)
    return found[0].dense(zero, positions, dtype=torch.float64)[:, 0].cpu()


@torch.no_grad()
def split_prior(prior: SumPrior, length: int) -> PriorParts:
    """Split a prior made by :func:`eotattn.priors.goat_prior`; the recency goes with the relative part.

    Example:
        >>> from eotattn.priors import goat_prior
        >>> parts = split_prior(goat_prior(2, init="neutral"), 5)
        >>> parts.relative.shape, float(parts.key_only.abs().max())
        (torch.Size([2, 5]), 0.0)
    """
    require(len(prior.parts) == 3, "split_prior", "prior", "have three parts", len(prior.parts), "Use goat_prior")
    positions, zero = _positions(prior, length)
    relative = sum(part.dense(positions, zero, dtype=torch.float64)[..., 0] for part in prior.parts[:2])
    assert isinstance(relative, Tensor)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    total = prior.dense(positions, positions, dtype=torch.float64).cpu().masked_fill(future, -math.inf)
    key_only = prior.parts[2].dense(zero, positions, dtype=torch.float64)[:, 0].cpu()
    return PriorParts(key_only, relative.cpu(), total)


def _positions(prior: LogPrior, length: int) -> tuple[Tensor, Tensor]:
    """Positions 0 ... L - 1 and position 0, on the prior's device."""
    check_positive_int("split_prior", "length", length)
    device = next(prior.parameters()).device
    return torch.arange(length, device=device), torch.zeros(1, dtype=torch.long, device=device)
