"""Content and lanes side by side: one kernel for all priors on a GPU, plain tensor operations elsewhere.

Legend: B batch, H heads of a side, L tokens, D content width, C columns of a table, P lanes, W kernel width.

The lanes of a side are pieces of (table @ matrix), see :mod:`eotattn.priors.lane_plan`; what is learned enters by the
matrix alone. In compiled graphs the plain form is fused by the compiler.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from eotattn.compat import is_intercepted
from eotattn.kernels.sdpa import kernel_width

__all__ = ["LaneSide", "append", "append_one", "uses_kernel"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None


class LaneSide(Protocol):
    """What the lanes of one side are made of: :class:`eotattn.priors.lane_plan.Side`."""

    @property
    def table(self) -> Tensor:
        """(L, C) or (B, L, C), float32 or float64."""

    @property
    def matrix(self) -> Tensor:
        """(1 or H, C, P), in the dtype of the table."""

    @property
    def piece(self) -> Tensor:
        """(P,) int8: which piece of its product a lane is."""

    @property
    def depth(self) -> int:
        """Pieces of a product at most."""

    @property
    def more(self) -> Tensor | None:
        """(..., H, L, P') further lanes in the kernel's dtype."""

    def lanes(self, dtype: torch.dtype) -> Tensor:
        """All of them, (..., 1 or H, L, P + P')."""


def append(
    query: Tensor, key: Tensor, query_side: LaneSide | None, key_side: LaneSide | None, far: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Put lanes beside the content of both sides.

    Args:
        query: (B, H, Q, D).
        key: (B, Hk, K, D).
        query_side: Lanes of the queries, or ``None``.
        key_side: Lanes of the keys, as many.
        far: One more lane on each side, broadcastable to (B, heads, L, 1), that hides padding.

    Returns:
        (B, H, Q, W) and (B, Hk, K, W), zeros behind the lanes up to the kernel's width.
    """
    hidden = (None, None) if far is None else far
    return append_one(query, query_side, hidden[0]), append_one(key, key_side, hidden[1])


def append_one(content: Tensor, side: LaneSide | None, far: Tensor | None = None) -> Tensor:
    """Put lanes beside the content of one side, in plain tensor operations."""
    lead = content.shape[:-1]
    parts = [content]
    if side is not None:
        lanes = side.lanes(content.dtype)
        parts.append(lanes.expand(*lead, lanes.shape[-1]))
    if far is not None:
        parts.append(far.expand(*lead, 1))
    width = sum(part.shape[-1] for part in parts)
    spare = kernel_width(width, content.device) - width
    if spare > 0:
        parts.append(content.new_zeros(()).expand(*lead, spare))
    return torch.cat(parts, dim=-1)
