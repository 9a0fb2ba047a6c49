"""A smooth decay as a sum of exponentials, which lanes carry: fitted far away, its error evaluated at every lag.

Legend: H heads, M exponentials, N nodes, T lags, L positions.

    decay(reach + t) = constant + sum_m amplitude[m] exp(-rate[m] t) + error,  t = 1, 2, ..., T
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eotattn.priors.bilinear import BilinearPrior
from eotattn.priors.memory import constants, remembered
from eotattn.priors.terms import Entry

__all__ = ["Decay", "ExponentialPrior", "Fit", "fit"]

#: (N,) distances in tokens, float64 -> (H, N) nats, with gradients to learned numbers.
Decay = Callable[[Tensor], Tensor]

#: Ratio of neighbouring rates at most. From 128 to 131 072 tokens it makes twelve exponentials, which leave 3e-5 of the
#: amplitude of a logarithm; eight would leave 2e-3. Closer rates make large amplitudes that cancel.
RATIO = 2.5
#: The slowest falls by this many nats over all lags, the fastest over the reach.
SLOWEST, FASTEST = 0.3, 4.0
#: Lags at which the sum is fitted.
NODES = 1500
#: Lags that are evaluated at a time.
STEP = 2**16


class Fit(NamedTuple):
    """A fitted decay.

    Args:
        prior: The exponentials: a query has as many tokens behind a boundary as its position says, a key before it.
        constant: (H,) float64 nats, with gradients to learned numbers.
        error: Largest error over all heads and lags, nats.
    """

    prior: ExponentialPrior
    constant: Tensor
    error: float

    @property
    def rounding(self) -> float:
        """Nats that sums in float32 may lose: amplitudes of either sign cancel."""
        return self.prior.typical_range * len(self.prior.rates) * torch.finfo(torch.float32).eps / 2


class ExponentialPrior(BilinearPrior):
    """log_prior = sum_m amplitude[head, m] exp(-rate[m] (query_position + key_position)), distances from a boundary.

    Both positions are at least zero, so that no exponential grows, however long the context is.

    Args:
        amplitudes: (H, M) nats.
        rates: M rates, per token.
        typical_range: Nats that the sizes of a head's amplitudes sum to at most.
    """

    def __init__(self, amplitudes: Tensor, rates: tuple[float, ...], typical_range: float) -> None:
        super().__init__(amplitudes.shape[0])
        self.rates = rates
        self.typical_range = typical_range
        self.amplitudes = amplitudes

    def query_features(self, positions: Tensor) -> Tensor:
        """Every exponential at the distance from the boundary."""
        return torch.exp(-positions.double().clamp(min=0).unsqueeze(-1) * constants(self.rates, positions.device))

    key_features = query_features

    def coefficients(self) -> Tensor:
        """The amplitudes."""
        return self.amplitudes

    def entries(self) -> tuple[Entry, ...]:
        """A diagonal."""
        return tuple((m, m, m, 1.0) for m in range(len(self.rates)))


def fit(decay: Decay, reach: int, furthest: int, device: torch.device, *, evaluate: bool = True) -> Fit:
    """Fit a decay from ``reach + 1`` to ``reach + furthest`` tokens by least squares; differentiable in its numbers.

    Without ``evaluate`` the error is NaN.
    """
    span = 2 ** math.ceil(math.log2(max(furthest, 8 * reach)))
    rates = _rates(reach, span)
    nodes, inverse = remembered(("exponentials", reach, span), device, lambda: _least_squares(rates, span, device))
    solution = decay(nodes + reach) @ inverse.mT
    amplitudes, constant = solution[:, :-1].contiguous(), solution[:, -1]
    with torch.no_grad():
        size = float(amplitudes.abs().sum(1).max().nan_to_num(nan=1.0).clamp(1.0, 2.0**60))
        worst = torch.full((), 0.0 if evaluate else float("nan"), dtype=torch.float64, device=device)
        for first in range(1, furthest + 1, STEP) if evaluate else ():
            lags = torch.arange(first, min(first + STEP, furthest + 1), dtype=torch.float64, device=device)
            sums = amplitudes @ torch.exp(-constants(rates, device)[:, None] * lags) + constant[:, None]
            worst = torch.maximum(worst, (sums - decay(lags + reach)).abs().amax().nan_to_num(nan=float("inf")))
    prior = ExponentialPrior(amplitudes, rates, 2.0 ** math.ceil(math.log2(size)))  # few sizes, few plans of lanes
    return Fit(prior, constant, float(worst) if evaluate else float("nan"))


def _rates(reach: int, span: int) -> tuple[float, ...]:
    """From slow to fast, geometrically."""
    slowest, fastest = SLOWEST / span, FASTEST / reach
    steps = math.ceil(math.log(fastest / slowest, RATIO))
    return tuple(slowest * (fastest / slowest) ** (m / steps) for m in range(steps + 1))


def _least_squares(rates: tuple[float, ...], span: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N,) lags, denser near the boundary, and the (M + 1, N) matrix from values there to amplitudes and constant."""
    spread = torch.logspace(0, math.log2(span), NODES, base=2.0, dtype=torch.float64).round()
    nodes = torch.cat([torch.arange(1, 64, dtype=torch.float64), spread]).unique()
    exponentials = torch.exp(-nodes[:, None] * torch.tensor(rates, dtype=torch.float64))
    matrix = torch.cat([exponentials, torch.ones(len(nodes), 1, dtype=torch.float64)], dim=1)
    return nodes.to(device), torch.linalg.pinv(matrix, rtol=1e-12).to(device)
