"""Rotary embeddings that only experiments need."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eotattn.attention import Rotary
from eotattn.checks import check_positive_int, require

__all__ = ["LeadingHeadsRotary", "StretchedRotary", "YarnRotary"]


class StretchedRotary(Rotary):
    """NTK-aware scaling: in windows longer than the training length the base of the frequencies grows.

    The slowest wave stretches with the window and the fastest stays. It reads the length of the window that it is
    given: for whole sequences, not for caches.

    Args:
        width: Head width of queries and keys, above 2.
        train_length: Tokens up to which the base stays as it is.

    Source:
        Base times stretch^(width / (width - 2)), the "NTK-aware" rule in section 3.1 of Peng et al. 2023
        (arXiv 2309.00071).

    Example:
        >>> StretchedRotary(4, train_length=8).stretched_base(16)
        40000.0
    """

    def __init__(self, width: int, *, train_length: int) -> None:
        super().__init__(width)
        require(width > 2, "StretchedRotary", "width", "exceed 2", width, "Use wider heads")
        self.train_length = check_positive_int("StretchedRotary", "train_length", train_length)

    def stretched_base(self, length: int) -> float:
        """The base for a window of ``length`` tokens."""
        stretch = max(1.0, length / self.train_length)
        return self.base * stretch ** (self.width / (self.width - 2))

    def forward(
        self, content: Tensor, positions: Tensor | range | None = None, *, argument: str = "positions"
    ) -> Tensor:
        """Turn ``content`` (B, H, L, D), a whole window, by its positions (L,) or (B, L), tokens."""
        return Rotary(self.width, base=self.stretched_base(content.shape[2]))(content, positions, argument=argument)


class YarnRotary(StretchedRotary):
    """YaRN: waves that turn often within the training length stay, slow ones stretch with the window, scores sharpen.

    Like :class:`StretchedRotary` it reads whole windows. Arguments are the same.

    Source:
        Peng et al. 2023 (arXiv 2309.00071): "NTK-by-parts" with alpha = 1 and beta = 32 turns, and queries and keys
        times 0.1 ln(stretch) + 1.

    Example:
        >>> rotary = YarnRotary(4, train_length=1024)
        >>> (rotary.frequencies(2.0) / rotary.frequencies(1.0)).tolist()  # 163 turns in 1024 tokens, and 1.63
        [1.0, 0.5101...]
    """

    def frequencies(self, stretch: float) -> Tensor:
        """(R,) radians a token in windows of ``stretch`` training lengths, float64."""
        half = self.width // 2
        frequency = self.base ** -(torch.arange(half, dtype=torch.float64) / half)
        turns = self.train_length * frequency / (2 * math.pi)
        kept = ((turns - 1) / (32 - 1)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / stretch)

    def forward(
        self, content: Tensor, positions: Tensor | range | None = None, *, argument: str = "positions"
    ) -> Tensor:
        """Turn ``content`` (B, H, L, D), a whole window, by its positions (L,), tokens."""
        length, device = content.shape[2], content.device
        at = torch.arange(length, device=device) if positions is None else torch.as_tensor(positions, device=device)
        stretch = max(1.0, length / self.train_length)
        phase = at.double()[:, None] * self.frequencies(stretch).to(device)
        scale = 0.1 * math.log(stretch) + 1
        cos, sin = ((scale * wave).float() for wave in (phase.cos(), phase.sin()))
        first, second = content.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(content.dtype)


class LeadingHeadsRotary(Rotary):
    """Rotation of the first heads alone; the others compare content without any position.

    Args:
        width: Head width of queries and keys.
        num_rotated: Heads that turn.
    """

    def __init__(self, width: int, *, num_rotated: int) -> None:
        super().__init__(width)
        self.num_rotated = check_positive_int("LeadingHeadsRotary", "num_rotated", num_rotated)

    def forward(
        self, content: Tensor, positions: Tensor | range | None = None, *, argument: str = "positions"
    ) -> Tensor:
        """Turn the leading heads of ``content`` (B, H, L, D) by positions (L,) or (B, L), tokens."""
        first, rest = content[:, : self.num_rotated], content[:, self.num_rotated :]
        return torch.cat([super().forward(first, positions, argument=argument), rest], dim=1)
