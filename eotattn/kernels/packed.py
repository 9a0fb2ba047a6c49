"""Packed documents, one stock fused call each: exact anywhere, in any dtype.

Legend: B batch, H query heads, G query heads a key head, L tokens of a row, D score width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eotattn.kernels import local, sdpa

__all__ = ["attend"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Sequence[int],
    scale: float,
    is_causal: bool = False,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute attention within each document.

    Args:
        query: (B, H, L, D), lanes included.
        key: (B, H / G, L, D).
        value: (B, H / G, L, V).
        lengths: Tokens of each document, row after row; they fill B rows of L tokens.
        scale: Factor on the inner products.
        is_causal: Queries see no later keys.
        window: Keys that a query sees at most, itself included; with ``is_causal``.
        dropout_p: Probability of dropping a weight.

    Returns:
        (B, H, L, V) in the dtype of ``query``.
    """
    rows = [side.transpose(0, 1).flatten(1, 2).unsqueeze(0) for side in (query, key, value)]
    parts = []
    for document in zip(*(side.split(list(lengths), dim=2) for side in rows), strict=True):
        if window is not None and window < document[0].shape[2]:
            part = local.attend(*document, scale=scale, window=window, dropout_p=dropout_p)
        else:
            part = sdpa.attend(*document, scale=scale, is_causal=is_causal, dropout_p=dropout_p)
        parts.append(part)
    return torch.cat(parts, dim=2).squeeze(0).unflatten(1, (query.shape[0], -1)).transpose(0, 1)
