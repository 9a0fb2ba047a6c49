"""Rotary embeddings that only experiments need."""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.attention import Rotary
from eotattn.checks import check_positive_int, require

__all__ = ["LeadingHeadsRotary", "StretchedRotary"]


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
