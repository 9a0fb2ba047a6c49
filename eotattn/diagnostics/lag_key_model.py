"""The two-part model pi_ij proportional to exp(a_(i-j) + v_j), solved from its margins, never with an L x L tensor.

Legend: H heads, L positions on a line, F tokens that lie on no line, G groups of sequences of one pattern.

Queries and keys sit at positions 0 to L - 1; lags run from -(L - 1) to L - 1. Every sum over keys, queries or pairs of
one lag is a convolution, done by FFT in float64. Class tokens lie nowhere: they come after the line, no lag reaches
them, and as keys they have a number of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["LagKeyModel", "RowGroup", "fit_margins"]


@dataclass(frozen=True)
class RowGroup:
    """Sequences that share which keys exist.

    Args:
        row_weight: (L + F,) number of sequences that have a query at each position.
        key_seen: (L + F,) 1.0 where they have a key, else 0.0.
    """

    row_weight: Tensor
    key_seen: Tensor


@dataclass(frozen=True)
class LagKeyModel:
    """exp(a) and exp(v), up to the gauge.

    Args:
        lag: (H, 2 L - 1) exp(a_t), zero at inadmissible lags.
        key: (H, L + F) exp(v_j).
        num_free: F, the last tokens, which lie off the line.
    """

    lag: Tensor
    key: Tensor
    num_free: int = 0

    def normaliser(self, group: RowGroup) -> Tensor:
        """(H, L + F) Z_i = sum_j exp(a_(i-j) + v_j) over the keys of the group, without a where i or j is off."""
        line, free = self._split(self.key * group.key_seen)
        off = free.sum(-1, keepdim=True)
        rows = _band(self.lag, line) + off
        return torch.cat([rows, (line.sum(-1, keepdim=True) + off).expand_as(free)], -1)

    def column_rates(self, group: RowGroup) -> Tensor:
        """(H, L + F) expected column mass divided by exp(v_j)."""
        line, free = self._split(self._row_scale(group))
        off = free.sum(-1, keepdim=True)
        columns = _band(self.lag.flip(-1), line) + off
        return torch.cat([columns, (line.sum(-1, keepdim=True) + off).expand_as(free)], -1) * group.key_seen

    def lag_rates(self, group: RowGroup) -> Tensor:
        """(H, 2 L - 1) expected lag mass between positions of the line, divided by exp(a_t)."""
        lags = self.lag.shape[-1]
        rows, keys = self._split(self._row_scale(group))[0], self._split(self.key * group.key_seen)[0]
        return _convolve(rows, keys.flip(-1), lags)[..., :lags]

    def _split(self, by_token: Tensor) -> tuple[Tensor, Tensor]:
        """What belongs to the line, and what lies off it."""
        length = by_token.shape[-1] - self.num_free
        return by_token[..., :length], by_token[..., length:]

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


@dataclass(frozen=True)
class _Targets:
    """Margins to reach."""

    lag_mass: Tensor
    column_mass: Tensor
    groups: tuple[RowGroup, ...]
    lag_seen: Tensor

    def heads(self, chosen: Tensor) -> _Targets:
        """Some heads only."""
        return _Targets(self.lag_mass[chosen], self.column_mass[chosen], self.groups, self.lag_seen)

    def sweep(self, model: LagKeyModel) -> tuple[LagKeyModel, Tensor]:
        """Rescale keys, then lags; also the relative deviation (H,) of the column mass before."""
        rates = _sum([model.column_rates(group) for group in self.groups])
        deviation = (model.key * rates - self.column_mass).abs().sum(-1) / self.column_mass.sum(-1)
        model = replace(model, key=_ratio(self.column_mass, rates))
        rates = _sum([model.lag_rates(group) for group in self.groups])
        return replace(model, lag=_ratio(self.lag_mass, rates) * self.lag_seen), deviation

    def objective(self, model: LagKeyModel) -> Tensor:
        """(H,) sum_i KL(p_i || pi_i) up to a constant, nats."""
        rows = [torch.xlogy(group.row_weight, model.normaliser(group)).sum(-1) for group in self.groups]
        return (
            _sum(rows)
            - torch.xlogy(self.lag_mass, model.lag).sum(-1)
            - torch.xlogy(self.column_mass, model.key).sum(-1)
        )


def fit_margins(
    lag_mass: Tensor,
    column_mass: Tensor,
    groups: tuple[RowGroup, ...],
    *,
    lag_seen: Tensor,
    num_free: int = 0,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
) -> tuple[LagKeyModel, Tensor]:
    """Find the model whose rows sum to one and whose lag and column mass are given: three-margin proportional fitting.

    Each step rescales one margin to its target, which is exact minimisation of the convex objective
    sum_i KL(p_i || pi_i) over one block of a or v; rows are normalised in between. Every third sweep starts from an
    extrapolation of the last two where that lowers the objective.

    Args:
        lag_mass: (H, 2 L - 1) targets, non-negative.
        column_mass: (H, L + F) targets; their total is the rows'.
        groups: Rows and keys that exist.
        lag_seen: (2 L - 1,) true at admissible lags.
        num_free: F, tokens off the line.
        max_iterations: Largest number of sweeps.
        tolerance: Largest total deviation of the column mass from its target, relative to the total, to stop at.

    Returns:
        The model, and (H,) the deviation reached.

    Source:
        Proportional fitting: Deming and Stephan 1940, Csiszar 1975; extrapolation: Varadhan and Roland 2008.
    """
    targets = _Targets(lag_mass, column_mass, groups, lag_seen)
    lag, key = lag_seen.to(lag_mass.dtype).repeat(len(lag_mass), 1), torch.ones_like(column_mass)
    deviation = column_mass.new_full(column_mass.shape[:1], torch.inf)
    active = torch.arange(len(lag_mass))
    for _ in range(max_iterations // 3):
        start, part = LagKeyModel(lag[active], key[active], num_free), targets.heads(active)
        once, deviation[active] = part.sweep(start)
        lag[active], key[active] = once.lag, once.key
        remaining = deviation[active] > tolerance
        if not bool(remaining.any()):
            break
        twice, _ = part.sweep(once)
        better = _better(part, _extrapolated(start, once, twice), twice)
        final, _ = part.sweep(better)
        lag[active], key[active] = final.lag, final.key
        active = active[remaining]
    return LagKeyModel(lag, key, num_free), deviation


def _extrapolated(start: LagKeyModel, once: LagKeyModel, twice: LagKeyModel) -> LagKeyModel:
    """The squared step of every head along its last two moves, in logarithms."""
    sizes = [start.lag.shape[-1], start.key.shape[-1]]
    points = [torch.cat([model.lag, model.key], -1).clamp(min=1e-300).log() for model in (start, once, twice)]
    move, bend = points[1] - points[0], points[2] - 2 * points[1] + points[0]
    length = (move.norm(dim=-1) / bend.norm(dim=-1).clamp(min=1e-300)).clamp(1.0, 1e3)[:, None]
    lag, key = (points[0] + 2 * length * move + length.square() * bend).clamp(-600, 600).exp().split(sizes, -1)
    return replace(twice, lag=torch.where(twice.lag > 0, lag, 0.0), key=torch.where(twice.key > 0, key, 0.0))


def _better(targets: _Targets, first: LagKeyModel, second: LagKeyModel) -> LagKeyModel:
    """Of two models, head by head, the one of lower objective; the second where that of the first is no number."""
    wins = (targets.objective(first) < targets.objective(second))[:, None]
    chosen = [torch.where(wins, getattr(first, part), getattr(second, part)) for part in ("lag", "key")]
    return replace(second, lag=chosen[0], key=chosen[1])


def _ratio(target: Tensor, rate: Tensor) -> Tensor:
    """Compute target / rate, zero where nothing is expected."""
    floor = 1e-15 * rate.amax(-1, keepdim=True)
    return torch.where(rate > floor, target / rate.clamp(min=1e-300), 0.0)


def _sum(rates: list[Tensor]) -> Tensor:
    return torch.stack(rates).sum(0) if len(rates) > 1 else rates[0]
