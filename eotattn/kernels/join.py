"""Content and lanes side by side in one launch for both sides, lanes evaluated on the way; needs Triton.

Legend: B batch, H heads, G query heads a key head, Q queries, K keys, D content width, W kernel width, C columns of
features.

What is learned enters a lane only through its coefficients (:mod:`eotattn.kernels.join_layout`), so the backward pass
is one weighted sum over tokens, taken while the gradient of the content is copied out. Compiled graphs call the same
kernels as operators of PyTorch, ``eotattn::join`` and ``eotattn::join_backward``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from eotattn.kernels.join_layout import MAX_TENSORS, Layout, read_layout
from eotattn.kernels.sdpa import kernel_width

__all__ = ["Join", "join", "join_in_graph", "refusal"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None


class Join(NamedTuple):
    """What :func:`join` puts beside the content.

    Args:
        layout: Which lane holds what.
        query_features: (at least ``query_first`` + Q, C) float32, contiguous: one row a position.
        key_features: Likewise.
        query_first: Row of the first query.
        key_first: Row of the first key.
        query_scale: Factor on the learned side: the inverse of the kernel's scale.
        padding: (B, K) boolean, true where a key is padding; one more lane then makes it inadmissible.
        far: Entry of that lane.
    """

    layout: Layout
    query_features: Tensor
    key_features: Tensor
    query_first: int
    key_first: int
    query_scale: float
    padding: Tensor | None = None
    far: float = 0.0

    def width(self, content_width: int, device: torch.device) -> int:
        """Width W of both sides."""
        return kernel_width(content_width + self.layout.num_lanes + (self.padding is not None), device)


@cache
def _launches() -> Any:
    """The kernels; a module that needs Triton."""
    from eotattn.kernels import join_launch_triton

    return join_launch_triton


def refusal(query: Tensor, key: Tensor, coefficients: Sequence[Tensor]) -> str | None:
    """Why this file cannot serve a call, or ``None`` if it can."""
    if query.device.type != "cuda" and not INTERPRETED:
        return f"it is a GPU kernel and the query is on {query.device.type}"
    if not HAS_TRITON:
        return "Triton is not installed"
    if query.dtype not in DTYPES:
        return f"it has no {query.dtype}"
    if type(query) is not Tensor or type(key) is not Tensor:
        return "it takes plain tensors"
    if len(coefficients) > MAX_TENSORS:
        return f"it takes at most {MAX_TENSORS} tensors of coefficients"
    for tensor in coefficients:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.dtype != torch.float32:
            return "it takes coefficients in float32"
    return None


def join(query: Tensor, key: Tensor, made: Join, coefficients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put lanes beside the content of both sides.

    Args:
        query: (B, H, Q, D).
        key: (B, H / G, K, D).
        made: The lanes.
        coefficients: Learned numbers in the order of the layout, each (H,) or (H, n), float32, contiguous.

    Returns:
        (B, H, Q, W) and (B, H / G, K, W), tokens before heads in memory. Gradients reach the content and the
        coefficients.
    """
    return _Joined.apply(query, key, made, *coefficients)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, made: Join, *coefficients: Tensor) -> tuple[Tensor, Tensor]:
        ctx.made, ctx.content_width = made, query.shape[-1]
        ctx.save_for_backward(*coefficients)
        return _launches().launch_join(query, key, made, coefficients)

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        return (_backward_once if torch.is_grad_enabled() else _backward)(ctx, grad_query, grad_key)


def _backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
    width, coefficients = ctx.content_width, ctx.saved_tensors
    if not any(ctx.needs_input_grad[3:]):
        return (grad_query[..., :width], grad_key[..., :width], None, *(None for _ in coefficients))
    query, key, flat = _launches().launch_split(grad_query, grad_key, ctx.made, coefficients, width)
    return (query, key, None, *torch._C._nn.unflatten_dense_tensors(flat, coefficients))


_backward_once = torch.autograd.function.once_differentiable(_backward)


# The same in compiled graphs -----------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("eotattn", "FRAGMENT")
_TAIL = "Tensor[] coefficients, int[] parts, float[] scales, int num_kv_heads, float query_scale"
_LIBRARY.define(
    f"join(Tensor query, Tensor key, Tensor query_features, Tensor key_features, Tensor? padding, float far, {_TAIL})"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "join_backward(Tensor grad_query, Tensor grad_key, Tensor query_features, Tensor key_features, int width, "
    f"{_TAIL}) -> (Tensor, Tensor, Tensor)"
)


def join_in_graph(
    query: Tensor,
    key: Tensor,
    features: tuple[Tensor, Tensor],
    coefficients: Sequence[Tensor],
    parts: Sequence[int],
    scales: Sequence[float],
    query_scale: float,
    padding: Tensor | None,
    far: float,
) -> tuple[Tensor, Tensor]:
    """:func:`join` as one operator, for graphs; ``parts`` and ``scales`` are read by :func:`read_layout`."""
    tail = (list(coefficients), list(parts), list(scales), key.shape[1], query_scale)
    return torch.ops.eotattn.join(query, key, *features, padding, far, *tail)


_Tail = tuple[list[Tensor], list[int], list[float], int, float]


def _made(num_heads: int, features: tuple[Tensor, Tensor], tail: _Tail) -> tuple[Join, list[Tensor]]:
    coefficients, parts, scales, num_kv_heads, query_scale = tail
    layout = read_layout(tuple(parts), tuple(scales), num_heads, num_kv_heads)
    query_features, key_features = (table.contiguous() for table in features)
    made = Join(layout, query_features, key_features, 0, 0, query_scale)
    return made, [tensor.contiguous() for tensor in coefficients]


def _join(
    query: Tensor, key: Tensor, first: Tensor, second: Tensor, padding: Tensor | None, far: float, *tail: Any
) -> tuple[Tensor, Tensor]:
    made, coefficients = _made(query.shape[1], (first, second), tail)
    return _launches().launch_join(query, key, made._replace(padding=padding, far=far), coefficients)


def _join_shapes(
    query: Tensor, key: Tensor, first: Tensor, second: Tensor, padding: Tensor | None, far: float, *tail: Any
) -> tuple[Tensor, ...]:
    made, _ = _made(query.shape[1], (first, second), tail)
    width = int(made._replace(padding=padding).width(query.shape[-1], query.device))
    with unset_fake_temporarily():  # tables of a layout made in a CUDA graph would lie in its memory
        made.layout.maps(query.device, width - int(query.shape[-1]))
    return tuple(_tokens_before_heads(side, width) for side in (query, key))


def _join_backward(
    query: Tensor, key: Tensor, first: Tensor, second: Tensor, width: int, *tail: Any
) -> tuple[Tensor, Tensor, Tensor]:
    made, coefficients = _made(query.shape[1], (first, second), tail)
    return _launches().launch_split(query, key, made, coefficients, width)


def _join_backward_shapes(
    query: Tensor, key: Tensor, first: Tensor, second: Tensor, width: int, *tail: Any
) -> tuple[Tensor, ...]:
    flat = torch.empty(sum(tensor.numel() for tensor in tail[0]), device=query.device)
    return (*(_tokens_before_heads(side, width) for side in (query, key)), flat)


def _tokens_before_heads(like: Tensor, width: int) -> Tensor:
    batch, heads, length, _ = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, _, query_features, key_features, _, _, coefficients, *ctx.tail = inputs
    ctx.width = query.shape[-1]
    ctx.save_for_backward(query_features, key_features, *coefficients)


def _graph_backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Any, ...]:
    first, second, *coefficients = ctx.saved_tensors
    sides = (grad_query, grad_key, first, second)
    query, key, flat = torch.ops.eotattn.join_backward(*sides, ctx.width, coefficients, *ctx.tail)
    pieces = flat.split([tensor.numel() for tensor in coefficients])
    grads = [piece.view(tensor.shape) for piece, tensor in zip(pieces, coefficients, strict=True)]
    return query, key, None, None, None, None, grads, None, None, None, None


_LIBRARY.impl("join", _join, "CPU" if INTERPRETED else "CUDA")
_LIBRARY.impl("join_backward", _join_backward, "CPU" if INTERPRETED else "CUDA")
torch.library.register_fake("eotattn::join", _join_shapes, lib=_LIBRARY)
torch.library.register_fake("eotattn::join_backward", _join_backward_shapes, lib=_LIBRARY)
torch.library.register_autograd("eotattn::join", _graph_backward, setup_context=_remember, lib=_LIBRARY)
