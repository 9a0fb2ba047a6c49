"""Packed documents, one stock fused call each: exact anywhere, in any dtype.

Legend: B batch, H query heads, G query heads a key head, L tokens of a row, D score width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from eotattn.kernels import local, sdpa

__all__ = ["attend"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Sequence[int],
    is_causal: bool = False,
    window: int | None = None,
    fused: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Compute attention within each document.

    Args:
        query: (B, H, L, D), lanes included.
        key: (B, H / G, L, D).
        value: (B, H / G, L, V).
        lengths: Tokens of each document, row after row; they fill B rows of L tokens.
        is_causal: Queries see no later keys.
        window: Keys that a query sees at most, itself included; with ``is_causal``.
        fused: The call that serves a document, by default :func:`eotattn.kernels.sdpa.attend`.
        options: What that call takes besides, e.g. ``scale``.

    Returns:
        What that call returns: (B, H, L, V), or a tuple of such tensors, (B, H, L, ...).
    """
    fused = sdpa.attend if fused is None else fused
    rows = [side.transpose(0, 1).flatten(1, 2).unsqueeze(0) for side in (query, key, value)]
    parts = []
    for document in zip(*(side.split(list(lengths), dim=2) for side in rows), strict=True):
        if window is not None and window < document[0].shape[2]:
            part = local.attend(*document, window=window, fused=fused, **options)
        else:
            part = fused(*document, is_causal=is_causal, **options)
        parts.append(part)
    found, batch = local.joined(parts), query.shape[0]
    return local.each(lambda one: one.squeeze(0).unflatten(1, (batch, -1)).transpose(0, 1), found)
