"""Decoding steps: one query against a cache, checked once for all steps that are alike.

Legend: B batch, H query heads, Hk key heads, D key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eotattn.attention.cache import KeyValueCache
from eotattn.attention.call import AttentionCall
from eotattn.kernels import sdpa
from eotattn.priors import LogPrior

__all__ = ["remember_step", "step_again"]


def step_again(
    query: Tensor, key: Tensor, value: Tensor, prior: LogPrior | None, cache: KeyValueCache, options: tuple[Any, ...]
) -> Tensor | None:
    """Attend like the step before, by views of the cache alone; ``None``, and nothing done, if this one is not like it.

    Args:
        query: (B, H, 1, D).
        key: (B, Hk, 1, D), appended to the cache.
        value: (B, Hk, 1, V), likewise.
        prior: Log-prior of the call.
        cache: Earlier keys and values.
        options: What else was asked for.

    Returns:
        (B, H, 1, V), or ``None``.
    """
    known = cache.step
    if known is None or not cache.has_room(1) or known[0] != _signature(query, key, value, prior, options):
        return None
    _, scale, window = known
    operands = cache.operands_after(query, key, value, prior, scale=scale)
    if operands is None:
        return None
    query, key, value = operands
    if window is not None:
        key, value = key[:, :, -window:], value[:, :, -window:]
    output = sdpa.attend(query, key, value, scale=scale)
    return output if output.shape[-1] == cache.value_width else output[..., : cache.value_width]


def remember_step(
    content: tuple[Tensor, Tensor, Tensor],
    call: AttentionCall,
    window: int | None,
    backend: str,
    options: tuple[Any, ...],
) -> None:
    """Let :func:`step_again` serve steps like ``call``, whose new tokens had ``content``, if that is all they need."""
    cache = call.cache
    alone = call.masks.dense is None and call.query.shape[2] == 1  # the one query sees the last keys, or all
    same = call.query is content[0]  # not cast for autocast
    if cache is not None and backend == "sdpa" and alone and same and not call.dropout_p:
        cache.step = _signature(*content, call.prior, options), call.scale, window


def _signature(
    query: Tensor, key: Tensor, value: Tensor, prior: LogPrior | None, options: tuple[Any, ...]
) -> tuple[Any, ...]:
    shapes, device = (query.shape, key.shape, value.shape), query.device
    dtypes, autocast = (query.dtype, key.dtype, value.dtype), torch.is_autocast_enabled(device.type)
    return (*shapes, *dtypes, device, key.device, value.device, autocast, id(prior), *options)
