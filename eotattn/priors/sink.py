"""SinkPrior: the key-only part u(j)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from eotattn.checks import check_positive, check_positive_int, require
from eotattn.priors.bilinear import BilinearPrior
from eotattn.priors.fourier import geometric_frequencies, waves
from eotattn.priors.terms import computing_dtype

__all__ = ["SinkPrior"]


class SinkPrior(BilinearPrior):
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
        frequencies: M floats, radians a token.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), section 3; the feature set is original.

    Example:
        >>> SinkPrior(num_heads=2).key_only(torch.arange(4)).shape
        torch.Size([2, 4])
    """

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
        self.frequencies = geometric_frequencies(num_frequencies, self.min_period, 2 * math.pi * self.length_scale)
        self.first_token = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.growth = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        if num_frequencies > 0:
            self.even = nn.Parameter(torch.empty(num_heads, num_frequencies, dtype=torch.float32))
            self.odd = nn.Parameter(torch.empty(num_heads, num_frequencies, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Neutral start: zero weights."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def key_only(self, key_positions: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """u(j) of every head and key: (H, K) or (B, H, K), in nats."""
        features = self.key_features(key_positions.double()).unsqueeze(-3)
        return (self.weights().double() @ features.mT).squeeze(-2).to(computing_dtype(dtype))

    def query_features(self, positions: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(positions).unsqueeze(-1)

    def key_features(self, positions: Tensor) -> Tensor:
        """First token, growth, cosines, sines."""
        position = positions.clamp(max=self.horizon)
        growth = torch.log1p(position.clamp(min=0)) / math.log1p(self.length_scale)
        first = torch.stack([(position == 0).to(growth.dtype), growth], dim=-1)
        return torch.cat([first, waves(position, self.frequencies)], dim=-1) if self.frequencies else first

    def learned(self) -> tuple[Tensor, ...]:
        """All weights of u."""
        first = self.first_token, self.growth
        return (*first, self.even, self.odd) if self.frequencies else first
