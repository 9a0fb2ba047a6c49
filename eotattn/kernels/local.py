"""Causal attention within a window, by blocks of stock fused calls: work and memory grow with L * window.

Legend: B batch, H query heads, G query heads a key head, Q queries, K keys, D score width, V value width, W window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eotattn.kernels import sdpa

__all__ = ["attend", "each", "joined"]

#: A window is so many blocks of queries. Every block copies the keys that it sees, so more blocks copy more; and it
#: computes pairs beyond the window only to mask them, so fewer blocks mask more. Two: three copies, a third masked.
BLOCKS = 2
#: Queries of a block at least.
MIN_BLOCK = 64


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    offset: int = 0,
    fused: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Compute attention in which query i sees keys i + offset - window + 1 to i + offset.

    Blocks of queries with all keys that any of them sees become samples of one fused call, under one small mask. The
    first queries, which see fewer keys, are a call of their own.

    Args:
        query: (B, H, Q, D), lanes included.
        key: (B, H / G, K, D) with K at least Q + offset.
        value: (B, H / G, K, V).
        window: Keys W that a query sees at most, itself included.
        offset: Keys before the first query, at least 0.
        fused: The call that serves a block, by default :func:`eotattn.kernels.sdpa.attend`.
        options: What that call takes besides, e.g. ``scale``.

    Returns:
        What that call returns: (B, H, Q, V), or a tuple of such tensors, (B, H, Q, ...).
    """
    fused = sdpa.attend if fused is None else fused
    queries, before = query.shape[2], window - 1
    unseen = max(0, offset - before)
    key, value = (side[:, :, unseen : offset + queries] for side in (key, value))
    offset = offset - unseen
    block = max(window // BLOCKS, MIN_BLOCK)
    num_blocks = max(0, queries - (before - offset)) // block
    head = queries - num_blocks * block  # these see keys from the first one on, the others only later ones
    parts = []
    if head > 0:
        seen = head + offset
        mask = None if head == 1 and seen <= window else _band(head, seen, offset, window, query.device)
        parts.append(fused(query[:, :, :head], key[:, :, :seen], value[:, :, :seen], mask=mask, **options))
    if num_blocks > 0:
        start = head + offset - before
        rows = query[:, :, head:].unflatten(2, (num_blocks, block)).transpose(1, 2).flatten(0, 1)
        keys, values = (_spans(side[:, :, start:], block + before, block) for side in (key, value))
        mask = _band(block, block + before, before, window, query.device)
        found = fused(rows, keys, values, mask=mask, **options)
        parts.append(each(lambda one: one.unflatten(0, (-1, num_blocks)).transpose(1, 2).flatten(2, 3), found))
    return joined(parts)


def joined(parts: Sequence[Any]) -> Any:
    """What calls for one run of queries after the other returned, for all of them: tensors, or tuples of tensors."""
    if isinstance(parts[0], tuple):
        return tuple(joined(part) for part in zip(*parts, strict=True))
    return torch.cat(list(parts), dim=2) if len(parts) > 1 else parts[0]


def each(change: Callable[[Tensor], Tensor], found: Any) -> Any:
    """A change of a tensor, or of every tensor of a tuple."""
    return tuple(change(one) for one in found) if isinstance(found, tuple) else change(found)


def _band(queries: int, keys: int, offset: int, window: int, device: torch.device) -> Tensor:
    """(Q, K) boolean: query i sees keys i + offset - window + 1 to i + offset."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset).triu(offset - window + 1)


def _spans(side: Tensor, size: int, step: int) -> Tensor:
    """(B, H, L, D) as samples (B * n, H, size, D): overlapping spans, one every ``step`` tokens."""
    return side.unfold(2, size, step).permute(0, 2, 1, 4, 3).flatten(0, 1)
