"""Content and lanes side by side: one kernel for all priors on a GPU, plain tensor operations elsewhere.

Legend: B batch, H heads of a side, L tokens, D content width, C columns of a table, P lanes, W kernel width.

The lanes of a side are pieces of (table @ matrix), see :mod:`eotattn.priors.lane_sides`; what is learned enters by the
matrix alone, so the backward pass is one weighted sum over tokens, taken while the gradient of the content is copied
out. In compiled graphs the plain form is fused by the compiler.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from eotattn.compat import is_intercepted
from eotattn.kernels.sdpa import kernel_width

__all__ = ["LaneSide", "append", "append_one", "append_plainly", "uses_kernel"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None


class LaneSide(Protocol):
    """What the lanes of one side are made of: :class:`eotattn.priors.lane_sides.Side`."""

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

    @property
    def gains(self) -> Tensor | None:
        """(B, H, L, P) factors of a query's own, which the plain form alone knows."""

    def lanes(self, dtype: torch.dtype) -> Tensor:
        """All of them, (..., 1 or H, L, P + P')."""


def append(
    query: Tensor,
    key: Tensor,
    query_side: LaneSide | None,
    key_side: LaneSide | None,
    far: tuple[Tensor, Tensor] | None,
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
    sides = (query_side, key_side)
    if uses_kernel((query, key), sides):
        width = _width(query, query_side, hidden[0])
        appended = _Append.apply(sides, hidden, width, query, key, *_learned(sides))
        return appended[0], appended[1]
    return append_plainly(query, query_side, hidden[0]), append_plainly(key, key_side, hidden[1])


def append_one(
    content: Tensor, side: LaneSide | None, far: Tensor | None = None, *, width: int | None = None
) -> Tensor:
    """Put lanes beside the content of one side, e.g. of the queries of a decoding step.

    Args:
        content: (B, H, L, D).
        side: Its lanes, or ``None``.
        far: One more lane, broadcastable to (B, H, L, 1).
        width: Width W; by default the narrowest that kernels like.
    """
    width = _width(content, side, far) if width is None else width
    if uses_kernel((content,), (side,)):
        appended: Tensor = _Append.apply((side,), (far,), width, content, *_learned((side,)))[0]
        return appended
    return append_plainly(content, side, far, width=width)


def append_plainly(
    content: Tensor, side: LaneSide | None, far: Tensor | None = None, *, width: int | None = None
) -> Tensor:
    """:func:`append_one` in plain tensor operations."""
    lead = content.shape[:-1]
    parts = [content]
    if side is not None:
        lanes = side.lanes(content.dtype)
        parts.append(lanes.expand(*lead, lanes.shape[-1]))
    if far is not None:
        parts.append(far.expand(*lead, 1))
    filled = 0
    for part in parts:
        filled += part.shape[-1]
    spare = (kernel_width(filled, content.device) if width is None else width) - filled
    if spare > 0:
        parts.append(content.new_zeros(()).expand(*lead, spare))
    return torch.cat(parts, dim=-1)


def uses_kernel(contents: Sequence[Tensor], sides: Sequence[LaneSide | None]) -> bool:
    """Whether the kernel serves these tensors: eager calls on a GPU, plain tensors, float32 tables."""
    if not HAS_TRITON or not (contents[0].device.type == "cuda" or INTERPRETED):
        return False
    if torch.compiler.is_compiling() or is_intercepted():
        return False
    for content, side in zip(contents, sides, strict=True):
        if type(content) is not Tensor or content.dtype not in DTYPES or content.numel() == 0:
            return False
        if side is not None and side.gains is not None:
            return False
        if side is not None and not (
            type(side.table) is type(side.matrix) is Tensor and side.table.dtype == side.matrix.dtype == torch.float32
        ):
            return False
    return True


def _width(content: Tensor, side: LaneSide | None, far: Tensor | None) -> int:
    """Width W: the narrowest that kernels like."""
    width = content.shape[-1] + (far is not None)
    if side is not None:
        width += side.matrix.shape[-1] + (0 if side.more is None else side.more.shape[-1])
    return kernel_width(width, content.device)


def _learned(sides: Sequence[LaneSide | None]) -> list[Tensor | None]:
    """What gradients are wanted for besides the contents: matrices, then further lanes."""
    matrices = [None if side is None else side.matrix for side in sides]
    return [*matrices, *(None if side is None else side.more for side in sides)]


@cache
def _launches() -> Any:
    """The kernels; a module that needs Triton."""
    from eotattn.kernels import append_launch_triton

    return append_launch_triton


class _Append(torch.autograd.Function):
    """One side or two; tensors come as contents, matrices, further lanes, side by side."""

    @staticmethod
    def forward(ctx: Any, sides: Any, fars: Any, width: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        contents = tensors[: len(sides)]
        ctx.sides, ctx.content_width = sides, contents[0].shape[-1]
        return tuple(_launches().launch_append(contents, sides, fars, width))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sides, width = ctx.sides, ctx.content_width
        wanted = ctx.needs_input_grad[3:]
        learns = wanted[len(sides) : 2 * len(sides)]
        if torch.is_grad_enabled():  # of a gradient: the same linear maps in operations that have derivatives
            contents = [grad[..., :width] for grad in grads]
            matrices = [
                _matrix_gradient(grad, side, width) if learn else None
                for grad, side, learn in zip(grads, sides, learns, strict=True)
            ]
        elif any(learns):
            contents, matrices = _launches().launch_split(grads, sides, learns, width)
        else:
            contents, matrices = [grad[..., :width] for grad in grads], [None] * len(sides)
        more = [
            _more_gradient(grad, side, width) if wants else None
            for grad, side, wants in zip(grads, sides, wanted[2 * len(sides) :], strict=True)
        ]
        return (None, None, None, *contents, *matrices, *more)


def _matrix_gradient(grad: Tensor, side: LaneSide, width: int) -> Tensor:
    """(1 or H, C, P): table^T @ gradient of the leading lanes, summed over samples and tokens."""
    lanes = grad[..., width : width + side.matrix.shape[-1]].to(side.table.dtype) * (side.piece == 0)
    by_head = (side.table.mT.unsqueeze(-3) @ lanes).sum(0)
    return by_head.sum_to_size(side.matrix.shape)


def _more_gradient(grad: Tensor, side: LaneSide, width: int) -> Tensor:
    """The gradient of the further lanes, in their shape."""
    assert side.more is not None
    first = width + side.matrix.shape[-1]
    return grad[..., first : first + side.more.shape[-1]].sum_to_size(side.more.shape)
