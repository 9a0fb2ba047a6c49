"""Rotary content: relative positions inside the score, to compare with priors or to combine with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eotattn.attention.positions import resolve_positions
from eotattn.checks import check_floating, check_positive, check_positive_int, check_shape, require

__all__ = ["Rotary"]


class Rotary(nn.Module):
    """Rotary position embedding of queries and keys; phases in float64, so exact at long positions.

    Feature pairs (r, r + rotary_width / 2) turn by position * base^(-2 r / rotary_width).

    Args:
        width: Head width of queries and keys.
        base: Base of the geometric frequencies, dimensionless.
        interpolation: Positions are divided by this: evaluation length over training length in linear interpolation.
        rotary_width: Even number of leading features that turn; by default all.

    Source:
        Su et al. 2021 (arXiv 2104.09864); linear interpolation, Chen et al. 2023 (arXiv 2306.15595).

    Example:
        >>> rotary = Rotary(4)
        >>> rotary(torch.ones(1, 1, 2, 4), torch.arange(2))[0, 0, 0]
        tensor([1., 1., 1., 1.])
    """

    def __init__(
        self, width: int, *, base: float = 10_000.0, interpolation: float = 1.0, rotary_width: int | None = None
    ) -> None:
        super().__init__()
        self.width = check_positive_int("Rotary", "width", width, minimum=2)
        self.base = check_positive("Rotary", "base", base)
        self.interpolation = check_positive("Rotary", "interpolation", interpolation)
        turned = width if rotary_width is None else rotary_width
        self.rotary_width = check_positive_int("Rotary", "rotary_width", turned, minimum=2)
        fits = self.rotary_width % 2 == 0 and self.rotary_width <= width
        require(fits, "Rotary", "rotary_width", f"be even and at most {width}", turned, "Choose an even width")

    def forward(
        self, content: Tensor, positions: Tensor | range | None = None, *, argument: str = "positions"
    ) -> Tensor:
        """Turn ``content`` by its positions.

        Args:
            content: (B, H, L, D).
            positions: (L,) or (B, L), tokens, or a ``range``; by default 0, 1, 2, ...
            argument: What errors call the positions.

        Returns:
            Same shape and dtype.
        """
        check_floating("Rotary", "content", content)
        check_shape("Rotary", "content", content, (None, None, None, self.width), "Split heads of this width first")
        batch, _, length, _ = content.shape
        positions = resolve_positions(
            "Rotary", argument, positions, batch=batch, length=length, num_coordinates=1, device=content.device
        ).tensor
        half = self.rotary_width // 2
        steps = torch.arange(half, dtype=torch.float64, device=content.device) / half
        angle = (positions.double() / self.interpolation).unsqueeze(-1) * self.base**-steps
        computing = torch.promote_types(content.dtype, torch.float32)
        cos, sin = angle.cos().to(computing), angle.sin().to(computing)
        if positions.dim() == 2:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        turned, still = content.split([self.rotary_width, self.width - self.rotary_width], dim=-1)
        first, second = turned.to(computing).chunk(2, dim=-1)
        rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(content.dtype)
        return rotated if self.rotary_width == self.width else torch.cat([rotated, still], dim=-1)

    def extra_repr(self) -> str:
        """The numbers that define the embedding."""
        return f"width={self.width}, base={self.base}, interpolation={self.interpolation}"
