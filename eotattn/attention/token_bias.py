"""What the tokens of a call add to its log-prior: a bias of every key, and of every query.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_no_nan, check_same_device, check_shape, fail, require
from eotattn.kernels import sdpa
from eotattn.priors import LogPrior
from eotattn.priors.memory import is_plain
from eotattn.priors.reading import expand_heads
from eotattn.priors.terms import BIAS_TERM, UNKNOWN_RANGE, Features, KeyTerm, Term, same_for_all_queries

__all__ = ["bias_terms", "check_biases", "check_gains", "gauge_lanes", "is_learned", "key_bias_term"]


def check_biases(
    owner: str, query: Tensor, key: Tensor, key_bias: Tensor | None, query_bias: Tensor | None, scale: float
) -> None:
    """Raise unless the biases fit a call and are finite; on a GPU, where looking would wait for it, none is read."""
    (batch, heads, queries, _), (_, key_heads, keys, _) = query.shape, key.shape
    for name, bias in (("key_bias", key_bias), ("query_bias", query_bias)):
        if bias is None:
            continue
        check_floating(owner, name, bias)
        check_same_device(owner, ("query", query), **{name: bias})
        remedy = "One number a head and token, in nats"
        if name == "query_bias":
            check_shape(owner, name, bias, (batch, heads, queries), remedy)
        elif bias.dim() != 3 or bias.shape[1] not in (1, key_heads, heads) or bias.shape[::2] != (batch, keys):
            counts = " or ".join(map(str, sorted({1, key_heads, heads})))
            fail(owner, name, f"have shape ({batch}, {counts}, {keys})", bias, remedy)
        if bias.device.type == "cpu" and is_plain() and bias.numel() > 0:
            check_no_nan(owner, name, bias.detach())
            _check_range(owner, name, bias, query.dtype, scale)


def check_gains(
    owner: str, query: Tensor, prior: LogPrior | None, gains: Tensor | Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """One factor (B, H, Q) or ``None`` for each term of the prior, or none at all; raises unless they fit."""
    rule, remedy = "be a tensor, or one or None for each term", "Pass those of prior.read_tokens(...)"
    are_known = isinstance(gains, (Tensor, tuple, list))
    require(are_known, owner, "query_gains", rule, gains, remedy, error=TypeError)
    if not isinstance(gains, Tensor) and all(gain is None for gain in gains):
        return ()
    remedy = "Pass those of prior.read_tokens(...), or one for the whole prior"
    if prior is None or not prior.has_lanes:
        got = "no prior" if prior is None else type(prior).__name__
        fail(owner, "query_gains", "belong to a prior with lanes", got, "Pass a BilinearPrior or a sum of them")
    terms = prior.terms()
    each = tuple(gains) if not isinstance(gains, Tensor) else (gains,) * len(terms)
    rule = f"be one for each of the prior's {len(terms)} terms"
    require(len(each) == len(terms), owner, "query_gains", rule, len(each), remedy)
    for term, gain in zip(terms, each, strict=True):
        if gain is None:
            continue
        check_floating(owner, "query_gains", gain)
        check_same_device(owner, ("query", query), query_gains=gain)
        check_shape(owner, "query_gains", gain, query.shape[:3], remedy)
        rule = "belong to terms with weights, not to a table of keys"
        require(isinstance(term, Term), owner, "query_gains", rule, type(prior).__name__, "Use a BilinearPrior")
        if gain.device.type == "cpu" and is_plain():
            check_no_nan(owner, "query_gains", gain.detach())
    return each


def _check_range(owner: str, name: str, bias: Tensor, dtype: torch.dtype, scale: float) -> None:
    if dtype == torch.float16 and name == "key_bias":
        limit = 6.5e4 * scale * 2.0 ** round(-math.log2(scale) / 2)  # what keys hold, after the queries' share
        rule, largest = f"lie within {limit:.0f} nats in float16", float(bias.detach().abs().max())
        require(largest <= limit, owner, name, rule, largest, "Take off a constant, or use bfloat16")


def bias_terms(call: Any) -> tuple[KeyTerm, ...]:
    """The bias of keys of an :class:`AttentionCall`, with a mask that depends on the key alone: one term, or none."""
    own, of_masks = call.key_bias, call.masks.key_bias
    if own is None and of_masks is None:
        return ()
    heads = call.query.shape[1]
    floor = sdpa.lowest_bias(call.query.dtype, scale=call.scale)
    features = same_for_all_queries(1 if call.prior is None else call.prior.num_coordinates, UNKNOWN_RANGE)
    if of_masks is None:
        return (key_bias_term(own, heads, call.key.shape[1], features),)
    if own is None:
        return (KeyTerm(features, lambda positions: of_masks.clamp(min=floor)),)
    return (KeyTerm(features, lambda positions: expand_heads(own, heads) + of_masks.clamp(min=floor)),)


def key_bias_term(bias: Tensor, num_heads: int, num_kv_heads: int, features: Features = BIAS_TERM.features) -> KeyTerm:
    """The term of a bias (B, 1 or Hk or H, K) that tokens bring; heads that share it share its lanes."""
    by_key_head = bias.shape[1] != num_heads or num_heads == num_kv_heads
    return KeyTerm(features, lambda positions: bias, by_key_head=by_key_head)


def is_learned(bias: Tensor | None) -> bool:
    """Whether a gradient is wanted for a bias."""
    return bias is not None and torch.is_grad_enabled() and bias.requires_grad


def gauge_lanes(call: Any) -> tuple[Tensor, Tensor] | None:
    """One lane (B, H, Q, 1) and (1, 1, 1, 1) for the gradient of the bias of queries, or ``None`` where none is wanted.

    The bias is a constant of its row, which softmax does not see, so the lane holds zero. Its gradient is what the
    kernel leaves of a sum that is zero in exact arithmetic. Sums of gradients of both biases, as those of forgetting
    gates, cancel it.
    """
    bias = call.query_bias
    if not is_learned(bias):
        return None
    lane = ((bias - bias.detach()) / call.scale).to(call.query.dtype).unsqueeze(-1)
    return lane, torch.ones((1, 1, 1, 1), dtype=call.query.dtype, device=lane.device)
