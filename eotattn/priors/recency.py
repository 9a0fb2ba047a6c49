"""RecencyPrior: learnable ALiBi slopes, never negative."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.checks import check_choice, check_positive_int, require
from eotattn.priors.bilinear import BilinearPrior
from eotattn.priors.terms import Entry

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
    check_positive_int("alibi_slopes", "num_heads", num_heads)
    whole = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (h + 1) / whole) for h in range(whole)]
    if whole == num_heads:
        return slopes
    return slopes + alibi_slopes(2 * whole)[0::2][: num_heads - whole]


def slope_of_mean_lag(mean_lag: float) -> float:
    """Slope of the causal recency prior whose mean lag is ``mean_lag`` tokens, nats a token.

    Among all distributions of the lags 0, 1, 2, ... with this mean, the geometric one has maximum entropy; the log of
    its ratio is -ln(1 + 1 / mean_lag).

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), appendix F, theorem 3.

    Example:
        >>> round(slope_of_mean_lag(1.0), 4)
        0.6931
    """
    return math.log1p(1 / mean_lag)


class RecencyPrior(BilinearPrior):
    """Recency: log_prior = -slope * (query_position - key_position), one learnable slope a head, never negative.

    It is directional: future keys get a *higher* log-prior, so it belongs under a causal mask, where it equals ALiBi
    and is the maximum-entropy prior of a given mean lag. The slope is ``strength`` times the head's unit slope, so
    that one optimiser step changes all slopes by the same fraction. The slope depends on the size of the strength, not
    on its sign, and has a gradient at zero too, so that a head without recency can gain it.

    Args:
        num_heads: Number of query heads H.
        init: ``"alibi"`` starts at the unit slopes, ``"neutral"`` at exactly zero (every parameter has a gradient).
        mean_lags: H mean lags, tokens, that the unit slopes belong to; ALiBi's slopes by default.

    Attributes:
        strength: (H,) dimensionless.
        unit_slopes: H floats, nats a token.
        slopes: (H,) nats a token.

    Source:
        Press, Smith and Lewis 2022 (arXiv 2108.12409); Litman and Guo 2026 (arXiv 2601.15380), appendix F, theorem 3.

    Example:
        >>> RecencyPrior(8).slopes[:3].tolist()
        [0.5, 0.25, 0.125]
    """

    is_relative = True
    typical_range = 20.0  # keys further than 20 / slope tokens away have no weight

    def __init__(self, num_heads: int, init: str = "alibi", mean_lags: Sequence[float] | None = None) -> None:
        super().__init__(num_heads)
        if mean_lags is not None:
            good = len(mean_lags) == num_heads and all(0 < lag < math.inf for lag in mean_lags)
            rule, remedy = f"hold {num_heads} positive numbers", "Pass one a head"
            require(good, "RecencyPrior", "mean_lags", rule, mean_lags, remedy)
        slopes = alibi_slopes(num_heads) if mean_lags is None else map(slope_of_mean_lag, mean_lags)
        self.unit_slopes = tuple(slopes)
        self.init = check_choice("RecencyPrior", "init", init, ("alibi", "neutral"))
        self.strength = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the unit slopes or at zero."""
        nn.init.constant_(self.strength, 1.0 if self.init == "alibi" else 0.0)

    @property
    def slopes(self) -> Tensor:
        """(H,) float64, nats a token."""
        return self.coefficients().squeeze(-1)

    def query_features(self, positions: Tensor) -> Tensor:
        """(1, position)."""
        return torch.stack([torch.ones_like(positions), positions], dim=-1)

    key_features = query_features

    def learned(self) -> tuple[Tensor, ...]:
        """The size of the strength."""
        return (functional.leaky_relu(-self.strength, -1.0),)  # unlike abs, has a gradient at zero

    def units(self) -> tuple[float, ...]:
        """The unit slopes."""
        return self.unit_slopes

    def entries(self) -> tuple[Entry, ...]:
        """[[0, slope], [-slope, 0]]: the slope times the key's position, less the slope times the query's."""
        return (0, 0, 1, 1.0), (0, 1, 0, -1.0)
