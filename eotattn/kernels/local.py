"""Causal attention within a window, by blocks of stock fused calls: work and memory grow with L * window.

Legend: B batch, H query heads, G query heads a key head, Q queries, K keys, D score width, V value width, W window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.kernels import sdpa

__all__ = ["attend"]

#: A window is so many blocks of queries. Every block copies the keys that it sees, so more blocks copy more; and it
#: computes pairs beyond the window only to mask them, so fewer blocks mask more. Two: three copies, a third masked.
BLOCKS = 2
#: Queries of a block at least.
MIN_BLOCK = 64


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int, offset: int = 0, dropout_p: float = 0.0
) -> Tensor:
    """Compute attention in which query i sees keys i + offset - window + 1 to i + offset.

    Blocks of queries with all keys that any of them sees become samples of one fused call, under one small mask. The
    first queries, which see fewer keys, are a call of their own.

    Args:
        query: (B, H, Q, D), lanes included.
        key: (B, H / G, K, D) with K at least Q + offset.
        value: (B, H / G, K, V).
        scale: Factor on the inner products.
        window: Keys W that a query sees at most, itself included.
        offset: Keys before the first query, at least 0.
        dropout_p: Probability of dropping a weight.

    Returns:
        (B, H, Q, V) in the dtype of ``query``.
    """
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
        parts.append(_attend(query[:, :, :head], key[:, :, :seen], value[:, :, :seen], mask, scale, dropout_p))
    if num_blocks > 0:
        start = head + offset - before
        rows = query[:, :, head:].unflatten(2, (num_blocks, block)).transpose(1, 2).flatten(0, 1)
        keys, values = (_spans(side[:, :, start:], block + before, block) for side in (key, value))
        mask = _band(block, block + before, before, window, query.device)
        output = _attend(rows, keys, values, mask, scale, dropout_p)
        parts.append(output.unflatten(0, (-1, num_blocks)).transpose(1, 2).flatten(2, 3))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout_p: float) -> Tensor:
    return sdpa.attend(query, key, value, scale=scale, mask=mask, dropout_p=dropout_p)


def _band(queries: int, keys: int, offset: int, window: int, device: torch.device) -> Tensor:
    """(Q, K) boolean: query i sees keys i + offset - window + 1 to i + offset."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset).triu(offset - window + 1)


def _spans(side: Tensor, size: int, step: int) -> Tensor:
    """(B, H, L, D) as samples (B * n, H, size, D): overlapping spans, one every ``step`` tokens."""
    return side.unfold(2, size, step).permute(0, 2, 1, 4, 3).flatten(0, 1)
