"""The two-part model pi_ij proportional to exp(a_(i-j) + v_j), solved from its margins, never with an L x L tensor.

Legend: H heads, L positions, G groups of sequences of one pattern.

Queries and keys sit at positions 0 to L - 1; lags run from -(L - 1) to L - 1. Every sum over keys, queries or pairs of
one lag is a convolution, done by FFT in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LagKeyModel", "RowGroup", "fit_margins"]


@dataclass(frozen=True)
class RowGroup:
    """Sequences that share which keys exist.

    Args:
        row_weight: (L,) number of sequences that have a query at each position.
        key_seen: (L,) 1.0 where they have a key, else 0.0.
    """

    row_weight: Tensor
    key_seen: Tensor


@dataclass(frozen=True)
class LagKeyModel:
    """exp(a) and exp(v), up to the gauge.

    Args:
        lag: (H, 2 L - 1) exp(a_t), zero at inadmissible lags.
        key: (H, L) exp(v_j).
    """

    lag: Tensor
    key: Tensor

    def normaliser(self, group: RowGroup) -> Tensor:
        """(H, L) Z_i = sum_j exp(a_(i-j) + v_j) over the keys of the group."""
        return _band(self.lag, self.key * group.key_seen)

    def column_rates(self, group: RowGroup) -> Tensor:
        """(H, L) expected column mass divided by exp(v_j)."""
        return _band(self.lag.flip(-1), self._row_scale(group)) * group.key_seen

    def lag_rates(self, group: RowGroup) -> Tensor:
        """(H, 2 L - 1) expected lag mass divided by exp(a_t)."""
        lags = 2 * self.key.shape[-1] - 1
        return _convolve(self._row_scale(group), (self.key * group.key_seen).flip(-1), lags)[..., :lags]

    def _row_scale(self, group: RowGroup) -> Tensor:
        normaliser = self.normaliser(group)
        return torch.where(group.row_weight > 0, group.row_weight / normaliser.clamp(min=1e-300), 0.0)


def _convolve(a: Tensor, b: Tensor, size: int) -> Tensor:
    """Circular convolution over at least ``size`` entries, clipped to what rounding leaves of positive sums."""
    size = 1 << (size - 1).bit_length()
    product = torch.fft.irfft(torch.fft.rfft(a, size) * torch.fft.rfft(b, size), size)
    return product.clamp(min=0)


def _band(lag: Tensor, by_position: Tensor) -> Tensor:
    """sum_j lag[i - j] by_position[j] for i from 0 to L - 1; wrap-around reaches only entries that are dropped."""
    length = by_position.shape[-1]
    return _convolve(lag, by_position, 2 * length - 1)[..., length - 1 : 2 * length - 1]


def _sum(groups: tuple[RowGroup, ...], rates: list[Tensor]) -> Tensor:
    total = rates[0]
    for rate in rates[1:]:
        total = total + rate
    return total


def fit_margins(
    lag_mass: Tensor,
    column_mass: Tensor,
    groups: tuple[RowGroup, ...],
    *,
    lag_seen: Tensor,
    max_iterations: int = 2000,
    tolerance: float = 1e-6,
) -> tuple[LagKeyModel, Tensor]:
    """Find the model whose rows sum to one and whose lag and column mass are given: three-margin proportional fitting.

    Each step rescales one margin to its target, which is exact minimisation of the convex objective
    sum_i KL(p_i || pi_i) over one block of a or v; rows are normalised in between.

    Args:
        lag_mass: (H, 2 L - 1) targets, non-negative.
        column_mass: (H, L) targets with the same totals.
        groups: Rows and keys that exist.
        lag_seen: (2 L - 1,) true at admissible lags.
        max_iterations: Largest number of sweeps.
        tolerance: Largest total deviation of the column mass from its target, relative to the total, to stop at.

    Returns:
        The model, and (H,) the deviation reached.

    Source:
        Original; iterative proportional fitting after Deming and Stephan 1940 and Csiszar 1975.
    """
    model = LagKeyModel(lag_seen.to(lag_mass.dtype).expand_as(lag_mass), torch.ones_like(column_mass))
    total = column_mass.sum(-1)
    deviation = torch.full_like(total, torch.inf)
    for sweep in range(max_iterations):
        rates = _sum(groups, [model.column_rates(group) for group in groups])
        if sweep % 10 == 9:
            deviation = (model.key * rates - column_mass).abs().sum(-1) / total
            if bool((deviation <= tolerance).all()):
                break
        model = LagKeyModel(model.lag, _ratio(column_mass, rates))
        rates = _sum(groups, [model.lag_rates(group) for group in groups])
        model = LagKeyModel(_ratio(lag_mass, rates) * lag_seen, model.key)
    return model, deviation


def _ratio(target: Tensor, rate: Tensor) -> Tensor:
    """Compute target / rate, zero where nothing is expected."""
    floor = 1e-15 * rate.amax(-1, keepdim=True)
    return torch.where(rate > floor, target / rate.clamp(min=1e-300), 0.0)
