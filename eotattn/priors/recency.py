"""RecencyPrior: learnable ALiBi slopes, never negative."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eotattn.checks import check_choice, require
from eotattn.priors.base import LogPrior
from eotattn.priors.expansion import Expansion, known_numbers
from eotattn.priors.lanes import NUM_DIGITS, LaneFactors, computing_dtype, is_low_precision, position_digits

__all__ = ["RecencyPrior", "alibi_slopes", "slope_of_mean_lag"]


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes for any number of heads, nats a token.

    A power of two H has the geometric sequence from 2^(-8 / H); other counts take the sequence of the next smaller
    power of two and fill up with every other slope of the next larger one.

    Source:
        Press, Smith and Lewis 2022 (arXiv 2108.12409).

    Example:
        >>> alibi_slopes(3)
        [0.0625, 0.00390625, 0.25]
    """
    whole = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (h + 1) / whole) for h in range(whole)]
    if whole == num_heads:
        return slopes
    return slopes + alibi_slopes(2 * whole)[0::2][: num_heads - whole]


def slope_of_mean_lag(mean_lag: float) -> float:
    """Slope of the causal recency prior whose mean lag is ``mean_lag`` tokens, nats a token; zero for infinity.

    Among all distributions of the lags 0, 1, 2, ... with this mean, the geometric one has maximum entropy; the log of
    its ratio is -ln(1 + 1 / mean_lag).

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), appendix F, theorem 3.

    Example:
        >>> round(slope_of_mean_lag(1.0), 4), slope_of_mean_lag(math.inf)
        (0.6931, 0.0)
    """
    return math.log1p(1 / mean_lag)


class RecencyPrior(LogPrior):
    """Recency: log_prior = -slope * (query_position - key_position), one learnable slope a head, never negative.

    It is directional: future keys get a *higher* log-prior, so it belongs under a causal mask, where it equals ALiBi
    and is the maximum-entropy prior of a given mean lag. The slope is ``strength`` times the head's unit slope, so
    that one optimiser step changes all slopes by the same fraction. The slope depends on the size of the strength, not
    on its sign, and has a gradient at zero too, so that a head without recency can gain it.

    Args:
        num_heads: Number of query heads H.
        init: ``"alibi"`` starts at the unit slopes, ``"neutral"`` at exactly zero (every parameter has a gradient).
        mean_lags: H mean lags, tokens, that the unit slopes belong to; ALiBi's slopes by default. A head whose mean lag
            is infinite has no recency, and cannot learn any: it forgets nothing at any length.

    Attributes:
        strength: (H,) dimensionless.
        slopes: (H,) nats a token.

    Source:
        Press, Smith and Lewis 2022 (arXiv 2108.12409); Litman and Guo 2026 (arXiv 2601.15380), appendix F, theorem 3.

    Example:
        >>> RecencyPrior(8).slopes[:3].tolist()
        [0.5, 0.25, 0.125]
    """

    unit_slopes: Tensor

    def __init__(self, num_heads: int, init: str = "alibi", mean_lags: Sequence[float] | None = None) -> None:
        super().__init__(num_heads)
        if mean_lags is not None:
            good = len(mean_lags) == num_heads and all(lag > 0 for lag in mean_lags)
            rule, remedy = f"hold {num_heads} positive numbers", "Pass one a head, math.inf for no recency"
            require(good, "RecencyPrior", "mean_lags", rule, mean_lags, remedy)
        self.mean_lags = None if mean_lags is None else tuple(mean_lags)
        self.init = check_choice("RecencyPrior", "init", init, ("alibi", "neutral"))
        self.strength = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.register_buffer("unit_slopes", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the unit slopes or at zero."""
        nn.init.constant_(self.strength, 1.0 if self.init == "alibi" else 0.0)
        self.fill_constants()

    def fill_constants(self) -> None:
        """Compute the unit slopes."""
        given = self.mean_lags
        slopes = alibi_slopes(self.num_heads) if given is None else [slope_of_mean_lag(lag) for lag in given]
        self.unit_slopes = torch.tensor(slopes, dtype=torch.float64, device=self.strength.device)

    @property
    def slopes(self) -> Tensor:
        """(H,) slopes in float32, nats a token."""
        size = torch.where(self.strength >= 0, self.strength, -self.strength)  # unlike abs, has a gradient at zero
        return size * self.unit_slopes.to(self.strength.dtype)

    def evaluate(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """-slope * lag, in nats."""
        return self.slopes[head] * (key_position - query_position)

    def factors(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype) -> tuple[LaneFactors, ...]:
        """One lane, slope against position; in 16-bit dtypes the position in exact digits, and a residual.

        The gradient of a slope is a sum of score gradients times positions. Those of a row sum to zero only in exact
        arithmetic; what is left of them, times a large position, is noise. The residual factor (one against zero) has
        that rest as its gradient, and kernels that know of it subtract it, so that lags are summed and not positions.
        """
        computing = computing_dtype(dtype)
        slopes = self.slopes.to(computing)[:, None, None]
        if is_low_precision(dtype):
            digits, weights = position_digits(key_positions, dtype)
            ones, nothing = torch.ones_like(digits[..., :1]), torch.zeros_like(weights[:1])
            key = torch.cat([digits, ones], dim=-1).to(computing)
            query = slopes * torch.cat([weights, nothing]).to(computing)
        else:
            key, query = key_positions.to(computing).unsqueeze(-1), slopes
        shape = (*query_positions.shape[:-1], self.num_heads, query_positions.shape[-1])
        row = -slopes.squeeze(-1) * query_positions.to(computing).unsqueeze(-2)
        return (LaneFactors(query.expand(*shape, query.shape[-1]), key.unsqueeze(-3), row=row, exact="key"),)

    def expansions(self, dtype: torch.dtype) -> tuple[Expansion, ...] | None:
        """The slope against the position, in 16-bit dtypes against its digits."""
        numbers = known_numbers(self.unit_slopes)
        if numbers is None:
            return None
        low = is_low_precision(dtype)

        def fixed(positions: Tensor) -> Tensor:
            if not low:
                return positions.float().unsqueeze(-1)
            digits = position_digits(positions, dtype)[0].float()
            return torch.cat([digits, torch.ones_like(digits[:, :1])], dim=-1)

        def learned(positions: Tensor) -> Tensor:
            if not low:
                return torch.ones_like(positions, dtype=torch.float32).unsqueeze(-1)
            digits, weights = position_digits(positions, dtype)
            nothing = torch.zeros_like(digits[:, :1])
            return torch.cat([weights.expand_as(digits), nothing, digits], dim=-1).float()

        part = Expansion(
            name=("recency", low),
            coefficients=(self.strength,),
            sources=((0,),) * (NUM_DIGITS + 1 if low else 1),
            learned="query",
            learned_features=learned,
            fixed_features=fixed,
            scale=numbers,
            by_size=True,
            fixed_is_exact=True,
            has_residual=low,
        )
        return (part,)
