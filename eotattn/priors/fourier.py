"""FourierPrior: a bounded relative prior with learned even and odd weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eotattn.checks import check_positive, check_positive_int, require
from eotattn.priors.base import LogPrior
from eotattn.priors.expansion import Expansion, Form, remembered
from eotattn.priors.frequencies import geometric_frequencies, phases

__all__ = ["FourierPrior"]


class FourierPrior(LogPrior):
    """The relative part of the GOAT prior, kappa(t) = sum_r even_r cos(omega_r t) + odd_r sin(omega_r t).

    t = query_position - key_position. Frequencies are fixed and geometric, weights are learned per head and may be
    negative (repulsion). Starts neutral: exactly zero, and every weight has a gradient.

    Args:
        num_heads: Number of query heads H.
        num_frequencies: Number of frequencies R, at least 1.
        min_period: Shortest period, tokens; above 2, where the odd part of integer lags would vanish.
        max_period: Longest period, tokens.

    Attributes:
        even: (H, R), nats: the symmetric part.
        odd: (H, R), nats: the directional part.
        frequencies: (R,) float64, radians a token.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), section 3; the trigonometric class of their appendix F.

    Example:
        >>> prior = FourierPrior(num_heads=2, num_frequencies=4, min_period=4.0, max_period=256.0)
        >>> prior.dense(torch.arange(5), torch.arange(7)).shape
        torch.Size([2, 5, 7])
    """

    def __init__(
        self, num_heads: int, num_frequencies: int = 8, min_period: float = 4.0, max_period: float = 8192.0
    ) -> None:
        super().__init__(num_heads)
        check_positive_int("FourierPrior", "num_frequencies", num_frequencies)
        self.min_period = check_positive("FourierPrior", "min_period", min_period)
        self.max_period = check_positive("FourierPrior", "max_period", max_period)
        require(self.min_period > 2, "FourierPrior", "min_period", "exceed 2 tokens", min_period, "Use e.g. 4.0")
        ordered = self.max_period >= self.min_period
        require(ordered, "FourierPrior", "max_period", "be at least min_period", max_period, "Swap or widen the range")
        self.even = nn.Parameter(torch.empty(num_heads, num_frequencies, dtype=torch.float32))
        self.odd = nn.Parameter(torch.empty(num_heads, num_frequencies, dtype=torch.float32))
        self._frequencies = geometric_frequencies(num_frequencies, self.min_period, self.max_period)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Neutral start: zero weights."""
        nn.init.zeros_(self.even)
        nn.init.zeros_(self.odd)

    @property
    def frequencies(self) -> Tensor:
        """(R,) float64, radians a token."""
        return torch.tensor(self._frequencies, dtype=torch.float64, device=self.even.device)

    def evaluate(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """kappa(query_position - key_position), in nats."""
        lag = query_position - key_position
        total = torch.zeros_like(lag)
        for r, frequency in enumerate(self._frequencies):
            angle = lag * frequency
            total = total + self.even[head, r] * angle.cos() + self.odd[head, r] * angle.sin()
        return total

    def expansions(self, dtype: torch.dtype) -> tuple[Expansion, ...]:
        """Two factors a frequency: the rotated weights of the query against (cos, sin) of the key."""
        return (Expansion(_form(self._frequencies), (self.even, self.odd), (1.0,) * self.num_heads),)


@remembered
def _form(frequencies: tuple[float, ...]) -> Form:
    """(even, odd) of every frequency against (cos, sin), and against (sin, -cos), of the query."""
    count = len(frequencies)
    pairs = tuple((r, count + r) for r in range(count))

    def learned(positions: Tensor) -> Tensor:
        cos, sin = phases(positions, frequencies)
        return torch.stack([torch.cat([cos, sin], -1), torch.cat([sin, -cos], -1)], dim=-1).flatten(-2)

    def fixed(positions: Tensor) -> Tensor:
        return torch.cat(phases(positions, frequencies), dim=-1)

    return Form("query", pairs + pairs, learned, fixed)
