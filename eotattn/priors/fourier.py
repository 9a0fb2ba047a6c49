"""FourierPrior: a bounded relative prior with learned even and odd weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from eotattn.checks import check_positive, check_positive_int, require
from eotattn.priors.bilinear import BilinearPrior
from eotattn.priors.memory import constants
from eotattn.priors.terms import Entry

__all__ = ["FourierPrior", "geometric_frequencies", "waves"]


def geometric_frequencies(count: int, min_period: float, max_period: float) -> tuple[float, ...]:
    """Frequencies, radians a token, geometric from 2 pi / min_period down to 2 pi / max_period.

    Example:
        >>> [round(2 * math.pi / frequency) for frequency in geometric_frequencies(3, 4.0, 64.0)]
        [4, 16, 64]
    """
    ratio = min_period / max_period
    return tuple(2 * math.pi / min_period * ratio ** (r / max(count - 1, 1)) for r in range(count))


def waves(positions: Tensor, frequencies: tuple[float, ...]) -> Tensor:
    """Cosines, then sines, of position * frequency: (..., 2 R) float64.

    A float32 phase at position 131 072 is off by 5e-4 radians; a float64 one by 1e-11.
    """
    angle = positions.double().unsqueeze(-1) * constants(frequencies, positions.device)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class FourierPrior(BilinearPrior):
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
        frequencies: R floats, radians a token.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), section 3; the trigonometric class of their appendix F.

    Example:
        >>> prior = FourierPrior(num_heads=2, num_frequencies=4, min_period=4.0, max_period=256.0)
        >>> prior.dense(torch.arange(5), torch.arange(7)).shape
        torch.Size([2, 5, 7])
    """

    is_relative = True
    typical_range = 1.0

    def __init__(
        self, num_heads: int, num_frequencies: int = 8, min_period: float = 4.0, max_period: float = 8192.0
    ) -> None:
        super().__init__(num_heads)
        check_positive_int("FourierPrior", "num_frequencies", num_frequencies)
        shortest = check_positive("FourierPrior", "min_period", min_period)
        longest = check_positive("FourierPrior", "max_period", max_period)
        require(shortest > 2, "FourierPrior", "min_period", "exceed 2 tokens", min_period, "Use e.g. 4.0")
        ordered = longest >= shortest
        require(ordered, "FourierPrior", "max_period", "be at least min_period", max_period, "Swap or widen the range")
        self.frequencies = geometric_frequencies(num_frequencies, shortest, longest)
        self.even = nn.Parameter(torch.empty(num_heads, num_frequencies, dtype=torch.float32))
        self.odd = nn.Parameter(torch.empty(num_heads, num_frequencies, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Neutral start: zero weights."""
        nn.init.zeros_(self.even)
        nn.init.zeros_(self.odd)

    def query_features(self, positions: Tensor) -> Tensor:
        """(cos, sin) of every frequency."""
        return waves(positions, self.frequencies)

    key_features = query_features

    def learned(self) -> tuple[Tensor, ...]:
        """Even, then odd weights."""
        return self.even, self.odd

    def entries(self) -> tuple[Entry, ...]:
        """[[even, -odd], [odd, even]] for each frequency, by the addition theorems."""
        count = len(self.frequencies)
        each = [((r, r, r, 1.0), (r, count + r, count + r, 1.0)) for r in range(count)]
        each += [((count + r, count + r, r, 1.0), (count + r, r, count + r, -1.0)) for r in range(count)]
        return tuple(entry for pair in each for entry in pair)
