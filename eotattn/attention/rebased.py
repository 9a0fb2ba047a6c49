"""Attention whose large numbers are counted from close by: stock calls over rectangles, merged by log-sum-exps.

A bias of keys that sums over many tokens, or a slope times a position, is a large number of which softmax sees small
differences. One call adds these numbers to scores in an accumulator of the kernel's digits. Here queries see the keys
of their own block of 128 in one call, earlier keys in log2(Q / 128) calls, and every call counts from its own keys: a
number is large where a key is far, and then only where its difference is. Exact, differentiable, no Q x K numbers.

Legend: B batch, H query heads, Q queries, K keys, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eotattn.attention.call import AttentionCall
from eotattn.attention.call_positions import Band, Positions
from eotattn.attention.merging import combine
from eotattn.attention.rectangles import BLOCK, Rectangle, rectangles
from eotattn.priors.memory import is_plain
from eotattn.priors.reading import expand_heads

__all__ = ["attend", "calls", "is_worth_it", "refusal"]

#: Nats below the largest bias that a call counts from, where a key has no weight any more.
NEGLIGIBLE = 100.0
#: Errors of the log-prior that calls may make by adding up a bias of keys, nats, unless a tolerance is given.
ALLOWED = {torch.float32: 1e-5, torch.float64: 1e-12}


def refusal(call: AttentionCall) -> str | None:
    """Why a call cannot be cut into rectangles, or ``None``."""
    masks, prior = call.masks, call.prior
    if masks.dense is not None or masks.documents is not None:
        return "it takes no mask of pairs and no documents; say is_causal, with no more queries than keys"
    if masks.band is not None and masks.band.window is not None:
        return "it has no window, in which numbers are small in any case"
    if call.dropout_p:
        return "it has no dropout"
    if prior is None:
        return None
    if not prior.has_lanes or prior.num_samples is not None:
        return "it counts the positions of priors with lanes, the same for every sample"
    first = call.query_positions.first, call.key_positions.first
    if first[0] is None or first[1] is None:
        return "its positions must be consecutive: ranges, or left out"
    if masks.band is not None and masks.band.offset != first[0] - first[1]:
        return "its positions must be those of the slots of the cache"
    return None


def is_worth_it(call: AttentionCall) -> bool:
    """Whether one call would add up the bias of keys less exactly than allowed; asked where that is known at once."""
    bias, length = call.key_bias, call.query.shape[2]
    if bias is None or length <= BLOCK or torch.compiler.is_compiling() or bias.device.type != "cpu" or not is_plain():
        return False
    allowed = ALLOWED.get(call.query.dtype) if call.tolerance is None else call.tolerance
    digits = torch.finfo(torch.promote_types(call.query.dtype, torch.float32)).eps / 2
    if allowed is None or bias.numel() == 0 or refusal(call) is not None:
        return False
    seen = _of_seen(bias.detach(), call.masks.padding)
    return float((seen.amax(-1) - seen.amin(-1)).max()) * digits > allowed


def calls(call: AttentionCall) -> Iterator[AttentionCall]:
    """The stock calls, for a call that is not refused; their biases no lower than where keys have weight.

    In the calls of blocks a query may see no key but those far below the largest, hence these are as they are.
    """
    for part in _parts(call):
        bias, sees_all = part.call.key_bias, part.call.masks.band is None
        yield replace(part.call, key_bias=bias.clamp(min=-NEGLIGIBLE)) if bias is not None and sees_all else part.call


def attend(call: AttentionCall, fused: Callable[[AttentionCall], Any]) -> tuple[Tensor, Tensor]:
    """Output (B, H, Q, V) and log-sum-exp (B, H, Q) of a call that is not refused.

    Args:
        call: The call.
        fused: Serves a call whose prior has lanes, with its log-sum-exp.
    """
    parts = list(_parts(call))
    level = _level_of_rows(call, parts)
    joined: tuple[Tensor, Tensor] | None = None
    for place, part, of_keys in parts:
        if level is not None and of_keys is not None:
            of_rows = of_keys - place.queries(level)
            of_rows = of_rows if part.query_bias is None else of_rows + part.query_bias
            part = replace(part, query_bias=of_rows)
        served = fused(part)
        output, lse = served.output.to(served.lse.dtype), served.lse
        one = place.placed(output, 0.0), place.placed(lse, float("-inf"))
        joined = one if joined is None else combine(*zip(joined, one, strict=True))[:2]
    assert joined is not None
    output, lse = joined
    own = None if call.query_bias is None else call.query_bias.detach().double()
    for constant in (level, own):
        lse = lse if constant is None else (lse + constant).to(lse.dtype)
    return output.to(call.query.dtype), lse


class _Part(NamedTuple):
    """One stock call, where its rows belong, and the number (B, H, 1) that its bias of keys counts from."""

    place: Rectangle
    call: AttentionCall
    level: Tensor | None


def _parts(call: AttentionCall) -> Iterator[_Part]:
    queries, keys, band = call.query.shape[2], call.key.shape[2], call.masks.band
    if call.key_bias is not None:
        call = replace(call, key_bias=_of_seen(call.key_bias, call.masks.padding))
    if band is None:
        yield _part(call, Rectangle(1, 0, queries, 0, keys, queries), None)
        return
    block = min(BLOCK, queries)
    blocks = -(-queries // block)
    if call.key_bias is not None and blocks > 1:  # what fills the last block up is no further away than its last key
        more = call.key_bias[..., -1:].expand(-1, -1, blocks * block - queries)
        call = replace(call, key_bias=torch.cat([call.key_bias, more], dim=-1))
    yield _part(call, Rectangle(blocks, 0, block, band.offset, block, queries, period=1), Band())
    for place in rectangles(queries, keys, band.offset, block):
        yield _part(call, place, None)


def _part(call: AttentionCall, place: Rectangle, band: Band | None) -> _Part:
    key_bias, level = None, None
    if call.key_bias is not None:
        bias = call.key_bias.double()
        level = place.keys(bias.detach(), -1, float("-inf")).amax(-1, keepdim=True)
        key_bias, level = place.keys(bias, -1) - level, expand_heads(level, call.query.shape[1])
    own = call.query_bias
    query_at, key_at = _positions(call, place)
    part = place.call(
        call,
        call.prior,
        query_at,
        key_at,
        key_bias=key_bias,
        query_bias=None if own is None else place.queries(own - own.detach()),
        query_gains=tuple(None if gain is None else place.queries(gain) for gain in call.query_gains),
    )
    return _Part(place, part if band is None else replace(part, masks=replace(part.masks, band=band)), level)


def _of_seen(bias: Tensor, padding: Tensor | None) -> Tensor:
    """A bias of keys (B, heads, K) in which padding, whose own may be anything, has the lowest of the other keys."""
    if padding is None:
        return bias
    lowest = bias.detach().masked_fill(padding.unsqueeze(1), float("inf")).amin(-1, keepdim=True)
    return torch.where(padding.unsqueeze(1), lowest.masked_fill(lowest.isinf(), 0.0), bias)


def _positions(call: AttentionCall, place: Rectangle) -> tuple[Positions, Positions]:
    """Where both sides of a call lie: the first pair, of priors that see differences alone, or every pair."""
    device, starts = call.query.device, (place.first_query, place.first_key)
    given = [side.first or 0 for side in (call.query_positions, call.key_positions)]
    sizes = place.size, place.width
    firsts = [first + start for first, start in zip(given, starts, strict=True)]
    if call.prior is None or call.prior.is_relative or place.pairs == 1:
        if call.prior is None or call.prior.is_relative:
            firsts = [firsts[0] - firsts[1], 0]
        query_at, key_at = (Positions(None, *run, device) for run in zip(firsts, sizes, strict=True))
        return query_at, key_at
    pair = torch.arange(place.pairs, device=device).repeat(call.query.shape[0])[:, None]
    query_at, key_at = (
        Positions(first + place.period * size * pair + torch.arange(size, device=device), None, size, device)
        for first, size in zip(firsts, sizes, strict=True)
    )
    return query_at, key_at


def _level_of_rows(call: AttentionCall, parts: list[_Part]) -> Tensor | None:
    """(B, H, Q) about the largest bias of a key that a query sees, which its log-sum-exps count from."""
    levels = [
        place.placed(level.expand(-1, -1, place.size), float("-inf")) for place, _, level in parts if level is not None
    ]
    return torch.stack(levels).amax(0) if levels else None
