"""Tsallis's divergence in place of the relative entropy: what makes sparsemax of softmax, around a prior."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.checks import require

__all__ = ["Tsallis"]

#: Relative change up to which a series serves; its first term left out is below 1e-12 of the sum.
_NEAR = 1e-2
_TERMS = 6


@dataclass(frozen=True)
class Tsallis:
    r"""Tsallis's divergence ``sum_ij R_ij f(P_ij / R_ij)``, ``f(t) = (t^alpha - alpha t + alpha - 1) / (alpha beta)``.

    Here and below ``beta = alpha - 1``. The prior enters as the reference of a divergence (the alpha-divergence, or
    Tsallis relative entropy), as it does in the entropic problem, which is the limit of alpha = 1. So -inf forbids a
    pair, and the weights of a query are ``prior_j [1 + beta (score_j / epsilon - threshold)]_+^(1 / beta)``. Under a
    log-prior of zero they are sparsemax for alpha = 2 and alpha-entmax below it.

    Args:
        alpha: In (1, 2]; the larger, the sparser.

    Raises:
        TypeError: If alpha is no number.
        ValueError: If it is out of range.

    Example:
        >>> from eotattn.transport import TransportProblem, solve
        >>> solve(TransportProblem(torch.tensor([[0.0, 0.5, 2.0]]), regulariser=Tsallis(2.0))).attention_weights
        tensor([[0., 0., 1.]])

    Source: a reference measure, Roulet et al. 2025, arXiv 2501.18537; one-sided transport, Litman 2025, arXiv
    2508.08369; without a prior, Martins and Astudillo 2016 and Peters et al. 2019.
    """

    alpha: float

    def __post_init__(self) -> None:
        is_number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        remedy = "Pass e.g. 2.0 for sparsemax or 1.5 for entmax"
        require(is_number, "Tsallis", "alpha", "be a number", self.alpha, remedy, error=TypeError)
        require(1 < self.alpha <= 2, "Tsallis", "alpha", "lie in (1, 2]", self.alpha, remedy)

    @property
    def beta(self) -> float:
        """``alpha - 1``."""
        return self.alpha - 1.0

    def log_growth(self, slope: Tensor) -> Tensor:
        """Log of the ratio t at which f has a slope: ``log(1 + beta slope) / beta``, -inf where none has."""
        inside = self.beta * slope > -1
        nats = torch.log1p(self.beta * torch.where(inside, slope, 0.0)) / self.beta
        return torch.where(inside, nats, -math.inf)

    def conjugate(self, slope: Tensor) -> Tensor:
        """The conjugate of f: ``([1 + beta slope]_+^(alpha / beta) - 1) / alpha``."""
        return torch.expm1(self.alpha * self.log_growth(slope)) / self.alpha

    def divergence(self, mass: Tensor, log_reference: Tensor, slope: Tensor | float = 0.0) -> Tensor:
        """``q (f(p / q) + f*(slope) - slope p / q)`` elementwise: never negative, zero where the slope is f's at p / q.

        A slope of zero leaves the divergence from q. With y the ratio that has the slope and ``r = p / (q y)`` it is
        ``q y^alpha f(r)``, whose series is summed where r is nearly one.
        """
        slope = torch.as_tensor(slope, dtype=mass.dtype, device=mass.device)
        growth = self.log_growth(slope)
        positive = mass > 0
        nats = torch.where(positive, torch.where(positive, mass, 1.0).log() - log_reference, 0.0)
        peak = torch.where(growth > -math.inf, (log_reference + self.alpha * growth).exp(), 0.0)
        change = torch.where(positive, torch.expm1(nats - growth), -1.0)
        near = change.abs() < _NEAR
        small = torch.where(near, change, 0.0)
        series = torch.ones_like(small)
        for k in range(_TERMS, 0, -1):
            series = 1.0 + series * small * (self.alpha - 1 - k) / (k + 2)
        used = torch.where(positive, torch.expm1(self.beta * nats) / self.beta - self.alpha * slope - 1.0, 0.0)
        direct = (torch.where(positive, mass * used, 0.0) + peak) / self.alpha
        return torch.where(near, 0.5 * peak * small.square() * series, direct.clamp(min=0))

    def __str__(self) -> str:
        return f"Tsallis({self.alpha:g})"
