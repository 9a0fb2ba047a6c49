"""PyTorch's variable-length flash kernel: packed documents, windows and chunks without a mask; on a GPU, in 16 bits.

Legend: B batch, H query heads, G query heads a key head, Q queries, K keys, T tokens of all sequences, N sequences,
D score width, V value width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.kernels.sdpa import kernel_width

__all__ = ["attend", "refusal", "width_refusal"]

#: Widest head of the flash kernel.
MAX_WIDTH = 256


@cache
def _varlen_attn() -> Callable[..., Any] | None:
    """PyTorch's function, or ``None`` where it is missing or knows no windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "scale"} <= set(inspect.signature(varlen_attn).parameters) else None


@cache
def _takes_groups() -> bool:
    """Whether PyTorch's function wants to be told that query heads share key heads."""
    function = _varlen_attn()
    return function is not None and "enable_gqa" in inspect.signature(function).parameters


def refusal(query: Tensor, *, dropout_p: float) -> str | None:
    """Why this backend cannot serve a call, whatever its width, or ``None`` if it can."""
    if query.device.type != "cuda":
        return f"it is a GPU kernel and the query is on {query.device.type}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it has no {query.dtype}"
    if dropout_p:
        return "it has no dropout"
    if _varlen_attn() is None:
        return f"PyTorch {torch.__version__} has no varlen_attn with windows"
    return None


def width_refusal(width: int) -> str | None:
    """Why heads of this width, lanes included, are too wide, or ``None`` if they are not."""
    wide = f"its heads are at most {MAX_WIDTH} wide and content with lanes is {width} wide"
    return wide if width > MAX_WIDTH else None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    offsets: Tensor | None = None,
    longest: int = 0,
    is_causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Compute attention within each sequence; the last query of a sequence sees its last key.

    Args:
        query: (B, H, Q, D), lanes included.
        key: (B, H / G, K, D).
        value: (B, H / G, K, V).
        scale: Factor on the inner products.
        offsets: (N + 1,) int32: where the sequences begin among the T = B * Q = B * K tokens; by default every sample
            is one sequence.
        longest: Tokens of the longest sequence, with ``offsets``.
        is_causal: Queries see no later keys.
        window: Keys that a query sees at most, itself included; with ``is_causal``.

    Returns:
        (B, H, Q, V) in the dtype of ``query``.
    """
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    width = kernel_width(max(query.shape[-1], value.shape[-1]), query.device)
    tokens = [_tokens(side, width) for side in (query, key, value)]
    starts, longest_of = [offsets, offsets], [longest, longest]
    if offsets is None:
        place: dict[str, Any] = {"dtype": torch.int32, "device": query.device}
        longest_of = [queries, keys]
        starts = [torch.arange(0, (batch + 1) * length, length, **place) for length in longest_of]
    function = _varlen_attn()
    assert function is not None, "refusal() comes first"
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] and _takes_groups() else {}
    left = -1 if window is None else window - 1
    size = (left, 0) if is_causal else (-1, -1)
    output = function(*tokens, *starts, *longest_of, scale=scale, window_size=size, **grouped)
    return output[..., : value.shape[-1]].unflatten(0, (batch, queries)).transpose(1, 2)


def _tokens(side: Tensor, width: int) -> Tensor:
    """(B, H, L, D) as (T, H, width), zeros behind."""
    tokens = side.transpose(1, 2).flatten(0, 1)
    return functional.pad(tokens, (0, width - side.shape[-1])) if side.shape[-1] < width else tokens
