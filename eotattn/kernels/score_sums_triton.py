"""The Triton kernels of :mod:`eotattn.kernels.score_sums`: two sweeps over tiles of logits that are never stored.

Legend: B batch, H query heads, G query heads a key head, Q queries, K keys, D score width, P lanes; DP, PP their tiles.

A tile's products come from tensor cores; everything else happens in registers, in base two. The first sweep belongs to
rows: a program holds some queries and meets all of their keys, as an attention forward pass does. The second belongs to
diagonals: a program holds one block diagonal, on which every entry of a tile keeps its lag from tile to tile, so that
lags are summed by one addition an entry; sums over the queries of a tile go to the columns.

Sums that several programs share are added as whole multiples of 2^-40, so that their order does not matter.
"""

# mypy: allow-untyped-defs
# ruff: noqa: ANN001, ANN202, N803 - the language of these kernels has types of its own

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from eotattn.kernels.score_sums import ScoreTiles

__all__ = ["launch_columns", "launch_rows"]

#: Queries, keys, warps and stages of a tile of the first sweep, by the bytes of an element.
ROW_TILES = {2: (128, 128, 8, 3), 4: (64, 64, 4, 2)}
#: Queries and keys, warps and stages of a (square) tile of the second sweep.
COLUMN_TILES = {2: (128, 8, 3), 4: (64, 4, 2)}
#: Tiles of a block diagonal that one program sums up.
SEGMENT = 512
#: Fields of a row that the first sweep stores.
ROW_FIELDS = 9

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

_LOG2_E = tl.constexpr(LOG2_E)
_LN_2 = tl.constexpr(LN_2)
# Below every logit; finite, so that nothing that is multiplied by a weight of zero becomes NaN.
_EMPTY = tl.constexpr(-1e30)
_FORBIDDEN = tl.constexpr(-2e30)
_FIXED_POINT = tl.constexpr(2.0**40)


@triton.jit
def _tile(left, right, scale, softcap, CAP: tl.constexpr, PRECISION: tl.constexpr):
    """Content of a tile: raw inner products, or capped scores in base two."""
    content = tl.dot(left, right, input_precision=PRECISION)
    if CAP:
        # tanh(u) = 1 - 2 / (1 + exp(2 u))
        grown = tl.exp2(content * (scale / softcap * 2.0 * _LOG2_E))
        content = (softcap * _LOG2_E) * (1.0 - 2.0 / (1.0 + grown))
    return content


@triton.jit
def _row_step(
    state, start, left, left_lanes, key, lanes, mask, rows, star, K, stride_k, stride_lk, shift, window, scale, softcap,
    unit,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, KEYED: tl.constexpr, CAP: tl.constexpr, PRIOR: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Meet the keys from ``start``: every sum over keys, relative to the largest logit so far."""
    top, total, spread, squares, low, high, best, score, best_content, prior_top, prior_total = state
    keys, width = start + tl.arange(0, BLOCK_K), tl.arange(0, DP)
    at = key + keys.to(tl.int64)[None, :] * stride_k + width[:, None]
    if MASKED:
        right = tl.load(at, mask=(keys < K)[None, :] & (width < D)[:, None], other=0.0)
    elif DP == D:
        right = tl.load(at)
    else:
        right = tl.load(at, mask=(width < D)[:, None], other=0.0)
    content = _tile(left, right, scale, softcap, CAP, PRECISION)
    logits = content
    if PRIOR:
        lane = tl.arange(0, PP)
        at = lanes + keys.to(tl.int64)[None, :] * stride_lk + lane[:, None]
        right_lanes = tl.load(at, mask=(keys < K)[None, :] & (lane < P)[:, None], other=0.0)
        prior = tl.dot(left_lanes, right_lanes, input_precision=PRECISION) * _LOG2_E
        logits = content * unit + prior
    step = 1.0 if PRIOR else unit
    smallest, largest, others = content, content, logits
    if MASKED:
        seen = (keys < K)[None, :] & (rows >= 0)[:, None]
        if CAUSAL:
            seen &= keys[None, :] <= (rows + shift)[:, None]
        if WINDOW:
            seen &= keys[None, :] > (rows + shift - window)[:, None]
        if KEYED:
            seen &= (tl.load(mask + keys, mask=keys < K, other=0) != 0)[None, :]
        smallest = tl.where(seen, content, -_FORBIDDEN)
        largest = tl.where(seen, content, _FORBIDDEN)
        logits = tl.where(seen, logits, _FORBIDDEN)
        others = tl.where((keys == star)[None, :], _FORBIDDEN, logits)
        if PRIOR:
            prior = tl.where(seen, prior, _FORBIDDEN)
    low = tl.minimum(low, tl.min(smallest, 1))
    rival = tl.max(others, 1)
    peak = tl.maximum(top, tl.max(logits, 1) if MASKED else rival)
    lowered = (top - peak) * step
    alpha = tl.exp2(lowered)
    relative = logits * step - (peak * step)[:, None]
    weight = tl.exp2(relative)
    spread = alpha * (spread + lowered * total) + tl.sum(weight * relative, 1)
    total = alpha * total + tl.sum(weight, 1)
    squares = alpha * alpha * squares + tl.sum(weight * weight, 1)
    if PRIOR:
        high = tl.maximum(high, tl.max(largest, 1))
        score = alpha * score + tl.sum(weight * content, 1)
        there = tl.max(tl.where(others == rival[:, None], content, _FORBIDDEN), 1)
        best_content = tl.where(rival > best, there, best_content)
        prior_peak = tl.maximum(prior_top, tl.max(prior, 1))
        prior_total = prior_total * tl.exp2(prior_top - prior_peak) + tl.sum(tl.exp2(prior - prior_peak[:, None]), 1)
        prior_top = prior_peak
    best = tl.maximum(best, rival)
    return peak, total, spread, squares, low, high, best, score, best_content, prior_top, prior_total


@triton.jit
def _rows(
    query, key, query_lanes, key_lanes, mask, star_of, out, Q, K, heads, stride_qb, stride_qh, stride_q, stride_kb,
    stride_kh, stride_k, stride_lqb, stride_lqh, stride_lq, stride_lkb, stride_lkh, stride_lk, shift, window, scale,
    softcap, unit, nats,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, KEYED: tl.constexpr, CAP: tl.constexpr,
    PRIOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Statistics of one block of queries of one head over all of their keys."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # causal rows: the longest first
    sample, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    first = block * BLOCK_Q
    rows, width = first + tl.arange(0, BLOCK_Q), tl.arange(0, DP)
    at = query + sample * stride_qb + head * stride_qh + rows.to(tl.int64)[:, None] * stride_q + width[None, :]
    left = tl.load(at, mask=(rows < Q)[:, None] & (width < D)[None, :], other=0.0)
    key += sample * stride_kb + (head // G) * stride_kh
    left_lanes = left
    if PRIOR:
        lane = tl.arange(0, PP)
        at = query_lanes + sample * stride_lqb + head * stride_lqh
        at = at + rows.to(tl.int64)[:, None] * stride_lq + lane[None, :]
        left_lanes = tl.load(at, mask=(rows < Q)[:, None] & (lane < P)[None, :], other=0.0)
        key_lanes += sample * stride_lkb + (head // G) * stride_lkh
    mask += sample * K
    star = tl.load(star_of + sample)
    # Keys from start to stop; those from clear to limit are admissible for every row and none of them is the star.
    start, stop, clear, limit = 0, K, tl.where((star >= 0) & (star < K), star + 1, 0), K
    if CAUSAL:
        stop = tl.minimum(K, first + BLOCK_Q + shift)
        limit = tl.minimum(K, first + shift + 1)
    if WINDOW:
        start = tl.maximum(0, first + shift - window + 1) // BLOCK_K * BLOCK_K
        clear = tl.maximum(tl.where(clear > start, clear, 0), first + BLOCK_Q + shift - window)
    clear = tl.maximum(start, (clear + BLOCK_K - 1) // BLOCK_K * BLOCK_K)
    limit = tl.maximum(limit, 0) // BLOCK_K * BLOCK_K
    if KEYED:
        limit = 0
    empty = tl.full([BLOCK_Q], _EMPTY, tl.float32)
    zero = tl.zeros([BLOCK_Q], tl.float32)
    state = (empty, zero, zero, zero, -empty, empty, empty, zero, zero, empty, zero)
    for at_key in range(start, tl.minimum(clear, stop), BLOCK_K):
        state = _row_step(
            state, at_key, left, left_lanes, key, key_lanes, mask, rows, star, K, stride_k, stride_lk, shift, window,
            scale, softcap, unit, D, DP, P, PP, BLOCK_K, CAUSAL, WINDOW, KEYED, CAP, PRIOR, True, PRECISION,
        )  # fmt: skip
    for at_key in range(clear, limit, BLOCK_K):
        state = _row_step(
            state, at_key, left, left_lanes, key, key_lanes, mask, rows, star, K, stride_k, stride_lk, shift, window,
            scale, softcap, unit, D, DP, P, PP, BLOCK_K, CAUSAL, WINDOW, KEYED, CAP, PRIOR, False, PRECISION,
        )  # fmt: skip
    for at_key in range(tl.maximum(clear, limit), stop, BLOCK_K):
        state = _row_step(
            state, at_key, left, left_lanes, key, key_lanes, mask, rows, star, K, stride_k, stride_lk, shift, window,
            scale, softcap, unit, D, DP, P, PP, BLOCK_K, CAUSAL, WINDOW, KEYED, CAP, PRIOR, True, PRECISION,
        )  # fmt: skip
    top, total, spread, squares, low, high, best, score, best_content, prior_top, prior_total = state
    safe = tl.where(total > 0, total, 1.0)
    logit_nats = _LN_2 if PRIOR else nats
    size = tl.num_programs(1).to(tl.int64) * Q
    out += tl.program_id(1).to(tl.int64) * Q + rows
    inside = rows < Q
    tl.store(out, top * logit_nats + tl.log2(safe) * _LN_2, mask=inside)
    tl.store(out + size, (tl.log2(safe) - spread / safe) * _LN_2, mask=inside)
    tl.store(out + 2 * size, squares / (safe * safe), mask=inside)
    tl.store(out + 3 * size, low * nats, mask=inside)
    tl.store(out + 6 * size, best * logit_nats, mask=inside)
    if PRIOR:
        tl.store(out + 4 * size, high * nats, mask=inside)
        tl.store(out + 5 * size, score / safe * nats, mask=inside)
        tl.store(out + 7 * size, best_content * nats, mask=inside)
        tl.store(
            out + 8 * size, (prior_top + tl.log2(tl.where(prior_total > 0, prior_total, 1.0))) * _LN_2, mask=inside
        )
    else:
        tl.store(out + 4 * size, top * nats, mask=inside)
        tl.store(out + 5 * size, top * nats + spread / safe * _LN_2, mask=inside)
        tl.store(out + 7 * size, best * nats, mask=inside)
        tl.store(out + 8 * size, zero, mask=inside)


@triton.jit
def _columns(
    query, key, query_lanes, key_lanes, mask, offsets, mass, lags, Q, K, heads, stride_qb, stride_qh, stride_q,
    stride_kb, stride_kh, stride_k, stride_lqb, stride_lqh, stride_lq, stride_lkb, stride_lkh, stride_lk, shift, window,
    scale, softcap, unit, diagonal, segments,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, KEYED: tl.constexpr, CAP: tl.constexpr,
    PRIOR: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Masses of a segment of one block diagonal: tiles of keys x queries whose first lag is the same."""
    diagonal += tl.program_id(0) // segments
    sample, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    inner, width = tl.arange(0, BLOCK), tl.arange(0, DP)
    query += sample * stride_qb + head * stride_qh
    key += sample * stride_kb + (head // G) * stride_kh
    if PRIOR:
        lane = tl.arange(0, PP)
        query_lanes += sample * stride_lqb + head * stride_lqh
        key_lanes += sample * stride_lkb + (head // G) * stride_lkh
    mask += sample * K
    offsets += tl.program_id(1).to(tl.int64) * Q
    mass += tl.program_id(1).to(tl.int64) * K
    lags += tl.program_id(1).to(tl.int64) * (Q + K - 1)
    first = tl.maximum(0, -diagonal)
    last = tl.minimum((K + BLOCK - 1) // BLOCK, (Q + BLOCK - 1) // BLOCK - diagonal)
    first += tl.program_id(0) % segments * SEGMENT
    last = tl.minimum(last, first + SEGMENT)
    by_place = tl.zeros([BLOCK, BLOCK], tl.float32)
    for block in range(first, last):
        keys, rows = block * BLOCK + inner, (block + diagonal) * BLOCK + inner
        key_at = key + keys.to(tl.int64)[:, None] * stride_k + width[None, :]
        query_at = query + rows.to(tl.int64)[None, :] * stride_q + width[:, None]
        if MASKED:
            left = tl.load(key_at, mask=(keys < K)[:, None] & (width < D)[None, :], other=0.0)
        elif DP == D:
            left = tl.load(key_at)
        else:
            left = tl.load(key_at, mask=(width < D)[None, :], other=0.0)
        right = tl.load(query_at, mask=(rows < Q)[None, :] & (width < D)[:, None], other=0.0)
        logits = _tile(left, right, scale, softcap, CAP, PRECISION) * unit
        if PRIOR:
            left = tl.load(
                key_lanes + keys.to(tl.int64)[:, None] * stride_lk + lane[None, :],
                mask=(keys < K)[:, None] & (lane < P)[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                query_lanes + rows.to(tl.int64)[None, :] * stride_lq + lane[:, None],
                mask=(rows < Q)[None, :] & (lane < P)[:, None], other=0.0,
            )  # fmt: skip
            logits += tl.dot(left, right, input_precision=PRECISION) * _LOG2_E
        offset = tl.load(offsets + rows, mask=rows < Q, other=float("inf"))
        logits -= offset[None, :]
        if MASKED:
            seen = (keys < K)[:, None] & (rows >= 0)[None, :]
            if CAUSAL:
                seen &= keys[:, None] <= (rows + shift)[None, :]
            if WINDOW:
                seen &= keys[:, None] > (rows + shift - window)[None, :]
            if KEYED:
                seen &= (tl.load(mask + keys, mask=keys < K, other=0) != 0)[:, None]
            logits = tl.where(seen, logits, -float("inf"))
        weight = tl.exp2(logits)
        by_place += weight
        found = (tl.sum(weight, 1) * _FIXED_POINT).to(tl.int64)
        tl.atomic_add(mass + keys, found, mask=keys < K, sem="relaxed")
    lag = diagonal * BLOCK + inner[None, :] - inner[:, None] + K - 1
    inside = (lag >= 0) & (lag < Q + K - 1) & (by_place > 0)
    tl.atomic_add(lags + lag, (by_place * _FIXED_POINT).to(tl.int64), mask=inside, sem="relaxed")


def launch_rows(tiles: ScoreTiles, star: Tensor) -> Tensor:
    """Sweep rows: (ROW_FIELDS, B, H, Q) float32, fields in the order of :class:`eotattn.kernels.score_sums.RowSums`.

    Args:
        tiles: The call.
        star: (B,) index of the key that the competitor is not.
    """
    batch, heads, queries, _ = tiles.query.shape
    block_q, block_k, warps, stages = _fitting(ROW_TILES, tiles)
    out = torch.empty(ROW_FIELDS, batch, heads, queries, dtype=torch.float32, device=tiles.query.device)
    unit, nats = _units(tiles)
    _rows[(triton.cdiv(queries, block_q), batch * heads)](
        *_operands(tiles),
        star.to(torch.int32),
        out,
        *_sizes_and_strides(tiles),
        tiles.scale,
        tiles.softcap or 0.0,
        unit,
        nats,
        **_shape(tiles),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def launch_columns(tiles: ScoreTiles, log_sum_exp: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Sweep diagonals: mass by key (B, H, K) and by lag (B, H, Q + K - 1), float64.

    Args:
        tiles: The call.
        log_sum_exp: (B, H, Q) nats; -inf where a query has no keys.
        counted: (B, Q) boolean, queries whose weights are summed.
    """
    batch, heads, queries, _ = tiles.query.shape
    keys = tiles.key.shape[2]
    block, warps, stages = _fitting(COLUMN_TILES, tiles)
    summed = counted[:, None, :] & (log_sum_exp > -math.inf)
    offsets = torch.where(summed, log_sum_exp * LOG2_E, math.inf)
    mass, lags = (
        torch.zeros(batch, heads, size, dtype=torch.int64, device=tiles.query.device)
        for size in (keys, queries + keys - 1)
    )
    segments = triton.cdiv(triton.cdiv(min(queries, keys), block), SEGMENT)
    for first, last, masked in _diagonals(tiles, block):
        _columns[((last - first) * segments, batch * heads)](
            *_operands(tiles),
            offsets,
            mass,
            lags,
            *_sizes_and_strides(tiles),
            tiles.scale,
            tiles.softcap or 0.0,
            _units(tiles)[0],
            first,
            segments,
            **_shape(tiles),
            MASKED=masked,
            BLOCK=block,
            SEGMENT=SEGMENT,
            num_warps=warps,
            num_stages=stages,
        )
    return mass.double() * 2.0**-40, lags.double() * 2.0**-40


def _diagonals(tiles: ScoreTiles, block: int) -> list[tuple[int, int, bool]]:
    """Spans of block diagonals (query block - key block) that hold admissible pairs, and whether they need a mask.

    Lags of diagonal d run from ``d block + shift - (block - 1)`` to ``d block + shift + block - 1``.
    """
    query_blocks, key_blocks = (triton.cdiv(side.shape[2], block) for side in (tiles.query, tiles.key))
    first, last = 1 - key_blocks, query_blocks
    clear, limit = first, last
    if tiles.is_causal:
        first = max(first, -((tiles.shift + block - 1) // block))
        clear = max(clear, -((tiles.shift - block + 1) // block))
    if tiles.window is not None:
        last = min(last, -((tiles.shift - block + 1 - tiles.window) // block))
        limit = min(limit, (tiles.window - tiles.shift - block) // block + 1)
    if tiles.key.shape[2] % block:
        clear = max(clear, query_blocks - key_blocks + 1)
    if tiles.key_mask is not None:
        clear = last
    clear = min(max(clear, first), last)
    limit = min(max(limit, clear), last)
    spans = [(first, clear, True), (clear, limit, False), (limit, last, True)]
    return [span for span in spans if span[0] < span[1]]


def _fitting(sizes: Mapping[int, tuple[int, ...]], tiles: ScoreTiles) -> tuple[int, ...]:
    return sizes[tiles.query.element_size()]


def _units(tiles: ScoreTiles) -> tuple[float, float]:
    """What turns the content of a tile into base two, and into nats."""
    return (tiles.scale * LOG2_E, tiles.scale) if tiles.softcap is None else (1.0, LN_2)


def _operands(tiles: ScoreTiles) -> tuple[Tensor, ...]:
    query_lanes = tiles.query if tiles.query_lanes is None else tiles.query_lanes
    key_lanes = tiles.key if tiles.key_lanes is None else tiles.key_lanes
    mask = tiles.query if tiles.key_mask is None else tiles.key_mask.to(torch.int8)
    return tiles.query, tiles.key, query_lanes, key_lanes, mask


def _sizes_and_strides(tiles: ScoreTiles) -> tuple[int, ...]:
    query, key, query_lanes, key_lanes, _ = _operands(tiles)
    strides = [side.stride()[:3] for side in (query, key, query_lanes, key_lanes)]
    sizes = (query.shape[2], key.shape[2], query.shape[1])
    return *sizes, *(step for side in strides for step in side), tiles.shift, tiles.window or 0


def _shape(tiles: ScoreTiles) -> dict[str, object]:
    """What a kernel is compiled for."""
    width = tiles.query.shape[-1]
    lanes = 1 if tiles.query_lanes is None else tiles.query_lanes.shape[-1]
    return {
        "G": tiles.query.shape[1] // tiles.key.shape[1],
        "D": width,
        "DP": max(16, triton.next_power_of_2(width)),
        "P": lanes,
        "PP": max(16, triton.next_power_of_2(lanes)),
        "CAUSAL": tiles.is_causal,
        "WINDOW": tiles.window is not None,
        "KEYED": tiles.key_mask is not None,
        "CAP": tiles.softcap is not None,
        "PRIOR": tiles.query_lanes is not None,
        # Three tf32 products make a float32 one, to 2e-6 nats.
        "PRECISION": "tf32x3" if tiles.query.dtype == torch.float32 else "ieee",
    }
