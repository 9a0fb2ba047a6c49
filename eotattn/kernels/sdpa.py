"""One unmodified ``scaled_dot_product_attention`` call, with the prior in extra lanes.

Legend: B batch, H query heads, Q queries, K keys, D score width, P lanes, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["attend", "kernel_width"]

#: Fused kernels on a GPU want head widths that are multiples of this.
WIDTH_STEP = 8


def kernel_width(width: int, device: torch.device) -> int:
    """The width of a fused call on ``device``: the next multiple of 8 on a GPU, ``width`` itself elsewhere."""
    return -(-width // WIDTH_STEP) * WIDTH_STEP if device.type == "cuda" else width


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    query_lanes: Tensor | None = None,
    key_lanes: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute attention whose score is scale * (<query, key> + <query_lanes, key_lanes>).

    Args:
        query: (B, H, Q, D).
        key: (B, H / G, K, D); G query heads share a key head, nothing is repeated in memory.
        value: (B, H / G, K, V).
        scale: Factor on all inner products, lanes included.
        query_lanes: Broadcastable to (B, H, Q, P), already divided by ``scale``.
        key_lanes: Broadcastable to (B, H / G, K, P).
        mask: Boolean (true may attend) or additive, broadcastable to (B, H, Q, K).
        is_causal: Query i sees keys 0 to i; not together with ``mask``.
        dropout_p: Probability of dropping a weight.

    Returns:
        (B, H, Q, V) in the dtype of ``query``.
    """
    if query_lanes is not None and key_lanes is not None:
        width = kernel_width(query.shape[-1] + query_lanes.shape[-1], query.device)
        query, key = _append(query, query_lanes, width), _append(key, key_lanes, width)
    value_width = value.shape[-1]
    padded = query.device.type == "cpu" and value_width < query.shape[-1]
    if padded:  # the fused CPU kernel wants equal widths; the path without it is several times slower
        value = functional.pad(value, (0, query.shape[-1] - value_width))
    output = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[..., :value_width] if padded else output


def _append(content: Tensor, lanes: Tensor, width: int) -> Tensor:
    """Content and lanes side by side, (B, H, L, width), zeros behind them."""
    parts = [content, lanes.expand(*content.shape[:-1], lanes.shape[-1])]
    spare = width - content.shape[-1] - lanes.shape[-1]
    if spare > 0:
        parts.append(content.new_zeros(()).expand(*content.shape[:-1], spare))
    return torch.cat(parts, dim=-1)
