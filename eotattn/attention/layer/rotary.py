"""Rotary content: relative positions inside the score, to compare with priors or to combine with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eotattn.attention.call_positions import Positions, resolve_positions
from eotattn.attention.layer.rotary_tables import FIRST_LENGTH, Frequencies, positions_table, run_table
from eotattn.checks import check_floating, check_positive, check_positive_int, check_shape, require
from eotattn.compat import in_export
from eotattn.priors.memory import may_remember

__all__ = ["Rotary"]


class Rotary(nn.Module):
    """Rotary position embedding of queries and keys; phases in float64, so exact at long positions.

    Feature pairs (r, r + rotary_width / 2) turn by position * base^(-2 r / rotary_width). Cosines and sines are
    computed once a length, for all layers alike, and compiled graphs take them as an input.

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
        self._run: Tensor | None = None  # no buffer: what a loader fills or a cast rounds would no longer be exact
        self._run_to(FIRST_LENGTH, torch.get_default_device(), torch.float32)

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
        resolved = resolve_positions(
            "Rotary", argument, positions, batch=batch, length=length, num_coordinates=1, device=content.device
        )
        computing = torch.promote_types(content.dtype, torch.float32)
        table = self._table(resolved, positions, computing)
        cos, sin = (table.unsqueeze(2) if table.dim() == 4 else table).unbind(0)
        first, second = content[..., : self.rotary_width].to(computing).chunk(2, dim=-1)
        rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(content.dtype)
        if self.rotary_width == self.width:
            return rotated
        return torch.cat([rotated, content[..., self.rotary_width :]], dim=-1)

    def _table(self, positions: Positions, given: Tensor | range | None, dtype: torch.dtype) -> Tensor:
        """Cosines and sines of the positions, (2, L, R) or (2, B, L, R)."""
        if positions.first is not None and positions.first >= 0:
            run = self._run_to(positions.first + positions.length, positions.device, dtype)
            if run is not None:
                return run.narrow(1, positions.first, positions.length)
        return positions_table(positions.tensor, given, self._frequencies, dtype)

    def _run_to(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """A table of ``length`` consecutive positions or more; ``None`` where there is none and none can be kept."""
        in_graph = torch.compiler.is_dynamo_compiling() and not in_export()
        if not (in_graph or may_remember(device)):
            return None
        run = self._run
        if run is not None and run.device == device and run.dtype == dtype and run.shape[1] >= length:
            return run
        if in_graph:
            return None
        size = FIRST_LENGTH
        while size < length:
            size *= 2
        self._run = run_table(self._frequencies, size, device, dtype)
        return self._run

    @property
    def _frequencies(self) -> Frequencies:
        return Frequencies(self.base, self.interpolation, self.rotary_width // 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Have the table where the model goes, so that a graph compiled there finds it."""
        super()._apply(fn, recurse)
        place = fn(torch.empty(0) if self._run is None else self._run[:0]).device
        self._run_to(FIRST_LENGTH, place, torch.float32)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files look the table up again."""
        return {**self.__dict__, "_run": None}

    def extra_repr(self) -> str:
        """The numbers that define the embedding."""
        return f"width={self.width}, base={self.base}, interpolation={self.interpolation}"
