"""SinkPrior: the key-only part u(j)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from eotattn.checks import check_positive, check_positive_int, require
from eotattn.priors.base import LogPrior
from eotattn.priors.expansion import Expansion, known_numbers
from eotattn.priors.frequencies import geometric_frequencies, phases
from eotattn.priors.lanes import LaneFactors, computing_dtype

__all__ = ["SinkPrior"]


class SinkPrior(LogPrior):
    """The key-only part of the GOAT prior: u(j) = first [j = 0] + growth ln(1 + j) / ln(1 + length_scale) + waves(j).

    waves(j) is a sum of cosines and sines with fixed geometric periods from ``min_period`` to 2 pi length_scale. The
    paper puts a small network on such features; this prior is linear in them, so that its neutral start is exactly zero
    and yet every weight has a gradient, and so that each weight can be read. The length scale is fixed at construction:
    u(j) never depends on the current length. A query-independent default needs exactly one lane.

    Waves that were trained on part of a period bend where no data held them. With a ``horizon``, u(j) keeps the value
    that it has there: all later keys are alike.

    Args:
        num_heads: Number of query heads H.
        num_frequencies: Number of wave frequencies M, 0 for none.
        length_scale: Tokens over which u varies; about the training length.
        min_period: Shortest wave, tokens.
        horizon: Position from which u is constant, tokens; by default it never is.

    Attributes:
        first_token: (H,) nats, added at position 0: the attention sink.
        growth: (H,) nats, reached at position ``length_scale``.
        even: (H, M) nats.
        odd: (H, M) nats.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), section 3; the feature set is original.

    Example:
        >>> SinkPrior(num_heads=2).key_only(torch.arange(4)).shape
        torch.Size([2, 4])
    """

    frequencies: Tensor

    def __init__(
        self,
        num_heads: int,
        num_frequencies: int = 4,
        length_scale: float = 2048.0,
        min_period: float = 16.0,
        horizon: float = math.inf,
    ) -> None:
        super().__init__(num_heads)
        check_positive_int("SinkPrior", "num_frequencies", num_frequencies, minimum=0)
        self.length_scale = check_positive("SinkPrior", "length_scale", length_scale)
        self.min_period = check_positive("SinkPrior", "min_period", min_period)
        self.horizon = check_positive("SinkPrior", "horizon", horizon, allow_inf=True)
        fits = self.min_period <= 2 * math.pi * self.length_scale
        require(fits, "SinkPrior", "min_period", "be at most 2 pi length_scale", min_period, "Lower it")
        self.first_token = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.growth = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.num_frequencies = num_frequencies
        self.register_buffer("frequencies", None, persistent=False)
        if num_frequencies > 0:
            self.even = nn.Parameter(torch.empty(num_heads, num_frequencies, dtype=torch.float32))
            self.odd = nn.Parameter(torch.empty(num_heads, num_frequencies, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Neutral start: zero weights."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.fill_constants()

    def fill_constants(self) -> None:
        """Compute the frequencies."""
        longest, device = 2 * math.pi * self.length_scale, self.first_token.device
        self.frequencies = geometric_frequencies(self.num_frequencies, self.min_period, longest, device)

    def key_only(self, key_positions: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """u(j) of every head and key: (H, K) or (B, H, K), in nats."""
        position = key_positions.double().clamp(max=self.horizon).unsqueeze(-2)
        log_position = torch.log1p(position.clamp(min=0)) / math.log1p(self.length_scale)
        u = self.first_token.double()[:, None] * (position == 0) + self.growth.double()[:, None] * log_position
        if self.frequencies.shape[0] > 0:
            cos, sin = phases(position, self.frequencies, torch.float64)
            u = u + (self.even.double()[:, None] * cos + self.odd.double()[:, None] * sin).sum(-1)
        return u.to(computing_dtype(dtype))  # summed in float64, since large terms may cancel

    def evaluate(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """u(key_position), in nats."""
        key_position = key_position.clamp(max=self.horizon)
        log_position = torch.log1p(key_position.clamp(min=0)) / math.log1p(self.length_scale)
        u = self.first_token[head] * (key_position == 0) + self.growth[head] * log_position
        for m in range(self.frequencies.shape[0]):
            angle = key_position * self.frequencies[m].to(key_position.dtype)
            u = u + self.even[head, m] * angle.cos() + self.odd[head, m] * angle.sin()
        return u + torch.zeros_like(query_position)

    def factors(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype) -> tuple[LaneFactors, ...]:
        """One lane: 1 against u(j)."""
        key = self.key_only(key_positions, dtype=dtype).unsqueeze(-1)
        shape = (*query_positions.shape[:-1], self.num_heads, query_positions.shape[-1], 1)
        return (LaneFactors(key.new_ones(()).expand(shape), key, exact="query"),)

    def expansions(self, dtype: torch.dtype) -> tuple[Expansion, ...] | None:
        """All weights against their features of the key; one factor."""
        numbers = known_numbers(self.frequencies)
        if numbers is None:
            return None
        coefficients = (self.first_token, self.growth, *((self.even, self.odd) if numbers else ()))
        part = Expansion(
            name=("sink", numbers, self.length_scale, self.horizon),
            coefficients=coefficients,
            sources=(tuple(range(2 + 2 * len(numbers))),),
            learned="key",
            learned_features=self._features,
            fixed_features=lambda positions: torch.ones_like(positions, dtype=torch.float32).unsqueeze(-1),
            scale=(1.0,) * self.num_heads,
            fixed_is_exact=True,
        )
        return (part,)

    def _features(self, positions: Tensor) -> Tensor:
        """What the weights multiply, (L, 2 + 2 M) float32: first token, growth, cosines, sines."""
        position = positions.double().clamp(max=self.horizon)
        growth = torch.log1p(position.clamp(min=0)) / math.log1p(self.length_scale)
        cos, sin = phases(position, self.frequencies, torch.float32)
        first = torch.stack([(position == 0).float(), growth.float()], dim=-1)
        return torch.cat([first, cos, sin], dim=-1)
