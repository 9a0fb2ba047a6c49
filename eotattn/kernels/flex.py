"""FlexAttention: any prior as a score modification, compiled into one kernel, on a GPU.

Legend: B batch, H query heads, Q queries, K keys, D score width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Pattern", "attend", "refusal"]

_MIN_WIDTH = 16  # of a head in FlexAttention's kernels; narrower ones are filled up with zeros


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


@dataclass(frozen=True)
class Pattern:
    """Which keys each query sees.

    Args:
        visible: Function (batch, head, query_index, key_index) -> boolean, true where a query may attend.
        by_sample: Whether it reads the sample.
        by_head: Whether it reads the head.
        name: Identifies the function, equal names meaning equal functions, so that its blocks are found once; ``None``
            for functions that read tensors of the caller.
    """

    visible: Callable[..., Tensor] = field(compare=False)
    by_sample: bool = False
    by_head: bool = False
    name: Hashable = None


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
    pattern: Pattern | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention with ``score_mod`` inside the kernel; blocks without a visible pair are skipped.

    Args:
        query: (B, H, Q, D).
        key: (B, H / G, K, D).
        value: (B, H / G, K, V).
        scale: Factor on the inner products.
        score_mod: Function (score, batch, head, query_index, key_index) -> score, e.g. ``LogPrior.score_mod()``.
        pattern: Which keys each query sees; all of them by default.
        with_lse: Whether the log-sum-exp is wanted.

    Returns:
        (B, H, Q, V) in the dtype of ``query``, and the log-sum-exp (B, H, Q) in float32, nats, or ``None``.
    """
    block_mask = None
    if pattern is not None:
        sizes = (*query.shape[:3], key.shape[2], query.device)
        block_mask = _blocks(pattern, *sizes) if pattern.name is None else _blocks_once(pattern, *sizes)
    grouped = query.shape[1] != key.shape[1]
    options: dict[str, Any] = {"score_mod": score_mod, "block_mask": block_mask, "scale": scale, "enable_gqa": grouped}
    sides = [functional.pad(side, (0, max(0, _MIN_WIDTH - side.shape[-1]))) for side in (query, key, value)]
    if not with_lse:
        return _compiled()(*sides, **options)[..., : value.shape[-1]], None
    output, lse = _compiled()(*sides, **_asking_for_lse(), **options)
    return output[..., : value.shape[-1]], getattr(lse, "lse", lse)


@cache
def _asking_for_lse() -> dict[str, Any]:
    """The argument by which this version of PyTorch is asked for the log-sum-exp."""
    try:
        from torch.nn.attention.flex_attention import AuxRequest
    except ImportError:
        return {"return_lse": True}
    return {"return_aux": AuxRequest(lse=True)}


def _blocks(pattern: Pattern, batch: int, heads: int, queries: int, keys: int, device: torch.device) -> Any:
    """Which blocks of pairs hold visible ones; costs as much as a dense mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    samples, by_head = batch if pattern.by_sample else None, heads if pattern.by_head else None
    return create_block_mask(pattern.visible, samples, by_head, queries, keys, device=str(device))


_blocks_once = lru_cache(maxsize=8)(_blocks)
