"""FlexAttention: any prior as a score modification, compiled into one kernel, on a GPU.

Legend: B batch, H query heads, Q queries, K keys, D score width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["attend", "refusal"]


def refusal(query: Tensor, *, mask: Tensor | None, dropout_p: float, learned: bool) -> str | None:
    """Why this backend cannot serve a call, or ``None`` if it can.

    Args:
        query: (B, H, Q, D).
        mask: Mask of pairs, if there is one.
        dropout_p: Probability of dropping a weight.
        learned: Whether a formula with learned numbers that are read more than once needs gradients.
    """
    if query.device.type != "cuda":
        return f"it compiles for a GPU and the query is on {query.device.type}"
    if dropout_p:
        return "it has no dropout"
    if mask is not None and mask.dtype != torch.bool:
        return "it takes no additive mask; add it to the prior as a DensePrior"
    if query.dtype == torch.float64:
        return "it has no float64"
    if learned:
        return "its backward pass does not compile for learned numbers of priors with lanes; freeze them or use 'sdpa'"
    return None


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    score_mod: Callable[..., Tensor] | None = None,
    visible: Callable[..., Tensor] | None = None,
    by_sample: bool = False,
) -> Tensor:
    """Compute attention with ``score_mod`` inside the kernel; blocks without a visible pair are skipped.

    Args:
        query: (B, H, Q, D).
        key: (B, H / G, K, D).
        value: (B, H / G, K, V).
        scale: Factor on the inner products.
        score_mod: Function (score, batch, head, query_index, key_index) -> score, e.g. ``LogPrior.score_mod()``.
        visible: Function (batch, head, query_index, key_index) -> boolean, true where a query may attend.
        by_sample: Whether ``visible`` reads the sample and the head.

    Returns:
        (B, H, Q, V) in the dtype of ``query``.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    block_mask = None
    if visible is not None:
        batch, heads = (query.shape[0], query.shape[1]) if by_sample else (None, None)
        device = str(query.device)
        block_mask = create_block_mask(visible, batch, heads, query.shape[2], key.shape[2], device=device)
    grouped = query.shape[1] != key.shape[1]
    return _compiled()(query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=grouped)
