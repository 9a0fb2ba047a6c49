"""Attention with a prior that is simple far away: near keys by blocks, far keys in stock calls, merged.

The near keys have the log-prior in full, the merger is by log-sum-exps: exact, differentiable, no Q x K numbers.

Legend: B batch, H query heads, Q queries, K keys, V value width, b queries of a block, S keys of a block, n blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention.call import AttentionCall
from eotattn.attention.call_positions import Band, Positions
from eotattn.attention.document_calls import document_calls
from eotattn.attention.masks import Masks
from eotattn.attention.merging import merge
from eotattn.attention.rectangles import BLOCK, Rectangle, reach_of, rectangles
from eotattn.kernels import near
from eotattn.priors import LogPrior, exponentials
from eotattn.priors.far_form import FarForm, Tail
from eotattn.priors.reading import expand_heads
from eotattn.priors.splitting import unit_roundoff

__all__ = ["attend", "describe", "far_calls", "far_error", "refusal"]


class _WithLse(Protocol):
    """What a fused backend makes of a call."""

    @property
    def output(self) -> Tensor: ...

    @property
    def lse(self) -> Tensor | None: ...


_Fused = Callable[[AttentionCall], _WithLse]


#: What a stock call for far keys has, besides its content; sinks and biases of queries count once, beside all parts.
STOCK: dict[str, Any] = {"return_lse": True, "cache": None, "sinks": None, "query_bias": None}


class Region(NamedTuple):
    """Queries and keys of one stock call."""

    queries: slice
    keys: slice
    is_causal: bool


def refusal(call: AttentionCall) -> str | None:
    """Why the prior of the call cannot be treated near and far apart, or ``None``."""
    query_at, key_at, masks = call.query_positions, call.key_positions, call.masks
    if call.prior is None:
        return "there is no prior to treat near and far apart"
    if masks.dense is not None:
        return "it takes no mask of pairs; say is_causal or window"
    if masks.documents is None and (query_at.first is None or key_at.first is None):
        return "its positions must be consecutive: ranges, or left out"
    if call.dropout_p:
        return "it has no dropout"
    if call.query_gains:
        return "it has no factors of a query's own"
    form = call.prior.far_form()
    if form is None:
        return "this prior is neither constant far away, nor smooth, nor carried by lanes there"
    if masks.documents is not None:
        if _is_smooth(form) or torch.compiler.is_compiling():
            return "it takes no documents in graphs, or with a smooth decay"
        return _too_near(form) if max(masks.documents.lengths) <= form.reach else None
    if masks.band is not None and masks.band.offset != _offset(call):
        return "its positions must be those of the slots of the cache"
    if _furthest(call) < form.reach:
        return _too_near(form)
    return _smooth_refusal(call) if _is_smooth(form) and _window(call) is None else None


def _too_near(form: FarForm) -> str:
    return f"no key is {form.reach} tokens away, so that nothing is far"


def _smooth_refusal(call: AttentionCall) -> str | None:
    """Why a smooth decay is not a sum of exponentials for this call, or ``None``."""
    if torch.compiler.is_compiling():
        return "the error of a smooth decay is evaluated before the call, which graphs cannot wait for"
    if not 0 <= _offset(call) <= call.key.shape[2] - call.query.shape[2]:
        return "a smooth decay wants queries that are among the keys"
    if any(tail.prior is not None for tail, _ in _sides(call)):
        return "a smooth decay beside a prior with lanes has no form far away"
    allowed = 2 * unit_roundoff(call.query.dtype) if call.tolerance is None else call.tolerance
    fits = [_fit(call, tail, is_past=is_past) for tail, is_past in _sides(call)]
    error = max(found.error + found.rounding for found in fits)
    if error <= allowed:
        return None
    return (
        f"its decay is a sum of exponentials within {error:.1e} nats far away, and {allowed:.1e} are allowed; pass a "
        f"larger tolerance or use backend='reference'"
    )


def far_error(call: AttentionCall) -> float:
    """Largest error of the log-prior of far keys, nats: of fitted exponentials, evaluated at every lag."""
    if not _is_smooth(_form(call)) or _window(call) is not None:
        return 0.0
    return max((_fit(call, tail, is_past=is_past).error for tail, is_past in _sides(call)), default=0.0)


def describe(call: AttentionCall) -> str:
    """What is near and what is far, for a call that is not refused."""
    form = _form(call)
    lanes = any(tail.prior is not None for tail in (form.past, form.future))
    far = "lanes" if lanes else "a constant a head"
    if _is_smooth(form) and _window(call) is None:
        error = far_error(call)
        far = f"exponentials within {error:.1e} nats (total variation at most {math.tanh(error / 2):.1e})"
    if form.reach == 0:
        return f"a stock call a side with {far}, merged"
    near_keys = f"the log-prior in full within {form.reach} tokens, by blocks"
    return near_keys if _window(call) is not None else f"{near_keys}; {far} beyond, in stock calls, merged"


def far_calls(call: AttentionCall) -> Iterator[AttentionCall]:
    """The stock calls for far keys."""
    if call.masks.documents is not None:
        for document in document_calls(call):
            yield from far_calls(document)
        return
    for tail, is_past in _sides(call):
        if _is_smooth(_form(call)):
            yield from (part for _, part in _smooth_parts(call, tail, is_past=is_past)[0])
        else:
            yield from (part for part, _ in _far_parts(call, tail, is_past=is_past))


def attend(call: AttentionCall, fused: _Fused) -> tuple[Tensor, Tensor]:
    """Output (B, H, Q, V) and log-sum-exp (B, H, Q) of a call that is not refused.

    Args:
        call: The call.
        fused: Serves a call whose prior has lanes, with its log-sum-exp.
    """
    if call.masks.documents is not None:
        each = zip(*(attend(document, fused) for document in document_calls(call)), strict=True)
        batch = call.query.shape[0]
        output, lse = (torch.cat(parts, dim=2).unflatten(2, (batch, -1))[0].transpose(0, 1) for parts in each)
        return output, lse
    far = _smooth if _is_smooth(_form(call)) else _far
    parts = [far(call, tail, fused, is_past=is_past) for tail, is_past in _sides(call)]
    if _form(call).reach > 0:
        parts.append(_near(call))
    output, lse = _merged([part for part in parts if part is not None])
    if call.query_bias is not None:
        lse = lse + call.query_bias.to(lse.dtype)
    return output.to(call.query.dtype), lse


def _merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return merge([output for output, _ in parts], [lse for _, lse in parts])


def _form(call: AttentionCall) -> FarForm:
    form = None if call.prior is None else call.prior.far_form()
    assert form is not None
    return form


def _offset(call: AttentionCall) -> int:
    """Query i and key i + offset have the same position."""
    assert call.query_positions.first is not None
    assert call.key_positions.first is not None
    return call.query_positions.first - call.key_positions.first


def _window(call: AttentionCall) -> int | None:
    return None if call.masks.band is None else call.masks.band.window


def _furthest(call: AttentionCall) -> int:
    """Largest distance of a key that a query may see."""
    past = call.query_positions.length - 1 + _offset(call)
    future = call.key_positions.length - 1 - _offset(call)
    return past if call.masks.band is not None else max(past, future)


def _sides(call: AttentionCall) -> list[tuple[Tail, bool]]:
    """What there is far away: its log-prior, and whether it lies before the query."""
    form = _form(call)
    sides = [(form.past, True)]
    if call.masks.band is None:
        sides.append((form.future, False))
    return sides if _window(call) is None or form.reach == 0 else []


def _is_smooth(form: FarForm) -> bool:
    return form.past.decay is not None or form.future.decay is not None


def _smooth_blocks(call: AttentionCall) -> near.Blocks:
    """Blocks whose edges are those of the far rectangles."""
    reach, offset, queries, keys = _form(call).reach, _offset(call), call.query.shape[2], call.key.shape[2]
    block = min(BLOCK, queries)
    before = reach_of(reach, offset, block)
    after = 0 if call.masks.band is not None else reach_of(reach, keys - offset - _padded(queries, block), block)
    return near.Blocks(queries, keys, offset, before, after, block=block, whole=True)


def _padded(queries: int, block: int) -> int:
    return -(-queries // block) * block


def _fit(call: AttentionCall, tail: Tail, *, is_past: bool, evaluate: bool = True) -> exponentials.Fit:
    blocks = _smooth_blocks(call)
    offset = blocks.offset if is_past else blocks.keys - blocks.queries - blocks.offset
    reach = blocks.before if is_past else blocks.after
    assert tail.decay is not None
    furthest = max(1, blocks.queries - 1 + offset - reach)
    return exponentials.fit(tail.decay, reach, furthest, call.query.device, evaluate=evaluate)


def _smooth_parts(
    call: AttentionCall, tail: Tail, *, is_past: bool
) -> tuple[Iterator[tuple[Rectangle, AttentionCall]], Tensor]:
    """The calls for far keys of one side, in the order of tokens or in reverse, and a constant to add."""
    blocks, found = _smooth_blocks(call), _fit(call, tail, is_past=is_past, evaluate=False)
    first = blocks.offset - blocks.before
    if not is_past:
        rows = _padded(blocks.queries, blocks.size)
        query = functional.pad(call.query, (0, 0, 0, rows - blocks.queries))
        turn = lambda side: None if side is None else side.flip(-1)  # noqa: E731
        call = replace(
            call,
            query=query.flip(2),
            key=call.key.flip(2),
            value=call.value.flip(2),
            masks=Masks(padding=turn(call.masks.padding), key_bias=turn(call.masks.key_bias)),
            key_bias=turn(call.key_bias),
        )
        first = blocks.keys - blocks.offset - rows - blocks.after
    constant = found.constant if tail.constant is None else found.constant + tail.constant
    return _of_exponentials(call, first, blocks.size, found.prior), constant


def _of_exponentials(
    call: AttentionCall, first: int, block: int, prior: LogPrior
) -> Iterator[tuple[Rectangle, AttentionCall]]:
    """The exponential of a lag is the product of two of distances from an edge, both at most one."""
    device = call.query.device
    for one in rectangles(call.query.shape[2], call.key.shape[2], first, block):
        query_at = Positions(None, max(0, first - one.width) if one.size == one.length else 0, one.size, device)
        key_at = Positions(torch.arange(one.width, 0, -1, device=device), None, one.width, device)
        yield one, one.call(call, prior, query_at, key_at)


def _smooth(call: AttentionCall, tail: Tail, fused: _Fused, *, is_past: bool) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp over the far keys of one side of a smooth decay, if there are any."""
    parts, constant = _smooth_parts(call, tail, is_past=is_past)
    joined: tuple[Tensor, Tensor] | None = None
    for rectangle, part in parts:
        served = fused(part)
        lse = served.lse
        assert lse is not None
        one = rectangle.placed(served.output.to(lse.dtype), 0.0), rectangle.placed(lse, float("-inf"))
        joined = one if joined is None else _merged([joined, one])
    if joined is None:
        return None
    output, lse = joined if is_past else (side.flip(2)[:, :, : call.query.shape[2]] for side in joined)
    return output, lse + constant.to(lse.dtype).unsqueeze(-1)


def _far(call: AttentionCall, tail: Tail, fused: _Fused, *, is_past: bool) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp over the far keys of one side, if there are any."""
    parts = []
    for part, rows in _far_parts(call, tail, is_past=is_past):
        served = fused(part)
        lse = served.lse
        assert lse is not None
        output = served.output.to(lse.dtype)  # rounded once, when all parts are one
        if tail.constant is not None:
            lse = lse + tail.constant.to(lse.dtype).unsqueeze(-1)
        missing = (rows.start, call.query.shape[2] - rows.stop)
        if any(missing):
            output = functional.pad(output, (0, 0, *missing))
            lse = functional.pad(lse, missing, value=float("-inf"))
        parts.append((output, lse))
    if not parts:
        return None
    output, lse = _merged(parts)
    return (output, lse) if is_past else (output.flip(2), lse.flip(2))


def _far_parts(call: AttentionCall, tail: Tail, *, is_past: bool) -> Iterator[tuple[AttentionCall, slice]]:
    """The calls for the far keys of one side, each with its queries; the future is the past of reversed tokens."""
    reach, queries, keys = _form(call).reach, call.query.shape[2], call.key.shape[2]
    turned = (lambda side, axis: side) if is_past else (lambda side, axis: side.flip(axis))
    content = [turned(side, 2) for side in (call.query, call.key, call.value)]
    after = keys - queries - _offset(call) - max(reach, 1)
    last = _offset(call) - reach if is_past else after
    whole = Region(slice(0, queries), slice(0, keys), True)
    window = _window(call)
    for region in _regions(queries, keys, last) if window is None else [whole]:
        rows, columns = region.queries, region.keys
        padding, of_mask, of_tokens = (
            None if side is None else turned(side, -1)[..., columns]
            for side in (call.masks.padding, call.masks.key_bias, call.key_bias)
        )
        band = call.masks.band if window is not None else Band() if region.is_causal else None
        part = replace(
            call,
            query=content[0][:, :, rows],
            key=content[1][:, :, columns],
            value=content[2][:, :, columns],
            prior=tail.prior,
            query_positions=_part_of(call.query_positions, rows, is_past=is_past),
            key_positions=_part_of(call.key_positions, columns, is_past=is_past),
            masks=Masks(padding=padding, key_bias=of_mask, band=band),
            key_bias=of_tokens,
            **STOCK,
        )
        yield part, rows


def _part_of(at: Positions, part: slice, *, is_past: bool) -> Positions:
    """Some of consecutive positions, or of the same in reverse."""
    assert at.first is not None
    length = part.stop - part.start
    if is_past:
        return Positions(None, at.first + part.start, length, at.device)
    last = at.first + at.length - 1 - part.start
    return Positions(torch.arange(last, last - length, -1, device=at.device), None, length, at.device)


def _regions(queries: int, keys: int, last: int) -> list[Region]:
    """What stock calls know of the pattern in which query i sees keys 0 to i + last."""
    seen_by_all = min(max(last, 0), keys)
    start = min(max(-last, 0), queries)
    square = min(queries - start, keys - seen_by_all)
    regions = [
        Region(slice(0, queries), slice(0, seen_by_all), False),
        Region(slice(start, start + square), slice(seen_by_all, seen_by_all + square), True),
        Region(slice(start + square, queries), slice(seen_by_all, keys), False),
    ]
    return [region for region in regions if all(part.stop > part.start for part in region[:2])]


def _near(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the near keys."""
    reach, window, masks = _form(call).reach, _window(call), call.masks
    before = reach - 1 if window is None else window - 1
    after = reach - 1 if masks.band is None else 0
    blocks = near.Blocks(call.query.shape[2], call.key.shape[2], _offset(call), before, after)
    if _is_smooth(_form(call)) and window is None:
        blocks = _smooth_blocks(call)
    bias = masks.key_bias
    if call.key_bias is not None:
        own = expand_heads(call.key_bias, call.query.shape[1])
        bias = own if bias is None else own + bias
    if masks.padding is not None:
        bias = call.query.new_zeros(()) if bias is None else bias
        bias = torch.where(masks.padding.unsqueeze(1), float("-inf"), bias)
    content = (call.query, call.key, call.value)
    return near.attend(*content, _tile(call, blocks), bias, scale=call.scale, blocks=blocks)


def _tile(call: AttentionCall, blocks: near.Blocks) -> Tensor:
    """(1, H, b, S) log-prior of a block and -inf where it sees nothing; (n, H, b, S) where blocks differ."""
    prior, device = call.prior, call.query.device
    assert prior is not None
    if prior.is_relative:
        query_at = torch.arange(blocks.before, blocks.before + blocks.size, device=device)
        key_at = torch.arange(blocks.span, device=device)
        tile = prior.dense(query_at, key_at, dtype=call.query.dtype).unsqueeze(0)
    else:
        assert call.query_positions.first is not None
        assert call.key_positions.first is not None
        query_at = blocks.query_index(device) + call.query_positions.first
        key_at = blocks.key_index(device) + call.key_positions.first
        tile = prior.dense(query_at, key_at, dtype=call.query.dtype)
    return tile.masked_fill(~blocks.visible(device), float("-inf"))
