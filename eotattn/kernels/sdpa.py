"""One unmodified ``scaled_dot_product_attention`` call, with the prior in extra lanes.

Legend: B batch, H query heads, Q queries, K keys, D score width, P lanes, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["attend", "far_lane", "far_lift", "kernel_width", "lowest_bias", "padding_lane"]

#: Fused kernels on a GPU want head widths that are multiples of this.
WIDTH_STEP = 8
#: Above a width of 64, cuDNN is faster at multiples of this: 3.3 ms at width 80, 3.5 ms at width 72.
WIDE_STEP = 16


def kernel_width(width: int, device: torch.device) -> int:
    """The width of a fused call on ``device``: on a GPU the next that kernels like, ``width`` itself elsewhere."""
    if device.type != "cuda":
        return width
    step = WIDTH_STEP if width <= 64 else WIDE_STEP
    return -(-width // step) * step


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute softmax(scale * <query, key>) and apply it to the values, in one fused call.

    Args:
        query: (B, H, Q, D), lanes included.
        key: (B, H / G, K, D); G query heads share a key head, nothing is repeated in memory.
        value: (B, H / G, K, V).
        scale: Factor on all inner products, lanes included.
        mask: Boolean (true may attend) or additive, broadcastable to (B, H, Q, K).
        is_causal: Query i sees keys 0 to i; not together with ``mask``.
        dropout_p: Probability of dropping a weight.

    Returns:
        (B, H, Q, V) in the dtype of ``query``.
    """
    value_width = value.shape[-1]
    padded = query.device.type == "cpu" and value_width < query.shape[-1]
    if padded:  # the fused CPU kernel wants equal widths; the path without it is several times slower
        value = functional.pad(value, (0, query.shape[-1] - value_width))
    # A branch, since graphs want no symbol as an argument.
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    output = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        **grouped,
    )
    return output[..., :value_width] if padded else output


def far_lane(dtype: torch.dtype, *, scale: float) -> float:
    """Entry of a lane that makes a key inadmissible: finite and far below any score, since inf * 0 is NaN."""
    return -6e4 if dtype == torch.float16 else -1e9 / scale


def far_lift(dtype: torch.dtype, *, scale: float) -> float:
    """The query's entry of that lane."""
    # float16 holds no such number, but the product of two: 1e7 nats, where float32 still tells one nat from the next,
    # since what a backward pass makes of rows without keys has to fit float16 too
    far = far_lane(dtype, scale=scale)
    return min(1e7 / (-far * scale), -far) if dtype == torch.float16 else 1.0


def lowest_bias(dtype: torch.dtype, *, scale: float) -> float:
    """The lowest log-prior of a key that lanes carry, nats: far below any score, and finite, since inf * 0 is NaN."""
    return -1e4 * min(1.0, scale**0.5) if dtype == torch.float16 else -1e30


def padding_lane(padding: Tensor, dtype: torch.dtype, *, scale: float) -> tuple[Tensor, Tensor]:
    """One lane that makes padding keys inadmissible.

    Args:
        padding: (B, K) boolean, true where a key is padding.
        dtype: The kernel's dtype.
        scale: The kernel's factor on inner products.

    Returns:
        Query lane (1, 1, 1, 1) and key lane (B, 1, K, 1). Admissible keys are untouched: their lane is zero.
    """
    far = far_lane(dtype, scale=scale)
    key_lane = torch.zeros(padding.shape, dtype=dtype, device=padding.device).masked_fill(padding, far)
    query_lane = torch.full((1, 1, 1, 1), far_lift(dtype, scale=scale), dtype=dtype, device=padding.device)
    return query_lane, key_lane[:, None, :, None]
