"""The Triton kernel of :func:`eotattn.kernels.score_sums.row_sums`: every row meets all of its keys once.

Legend: B batch, H query heads, G query heads a key head, Q queries, K keys, D score width, P lanes; DP, PP their tiles.

A program holds a block of queries and walks along their keys, as an attention forward pass does. Sums are relative to
the largest logit so far, and are lowered when a larger one comes.
"""

# mypy: allow-untyped-defs
# ruff: noqa: ANN001, ANN202, N803 - the language of these kernels has types of its own

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eotattn.kernels.score_tiles import ScoreTiles
from eotattn.kernels.score_tiles_triton import (
    EMPTY,
    FORBIDDEN,
    LN_2,
    LOG2_E,
    content_tile,
    operands,
    shape,
    sizes,
    units,
)

__all__ = ["launch_rows"]

#: Queries, keys, warps and stages of a tile, by the bytes of an element and whether there is a prior: the fastest of
#: nine on an H200 in bfloat16 at width 64; with a prior, those that spill no register at any width.
TILES = {
    (2, False): (128, 128, 4, 3),
    (2, True): (128, 64, 8, 3),
    (4, False): (64, 64, 4, 2),
    (4, True): (64, 32, 4, 2),
}
#: Fields of a row that are stored.
NUM_FIELDS = 9


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
    content = content_tile(left, right, scale, softcap, CAP, PRECISION)
    logits = content
    if PRIOR:
        lane = tl.arange(0, PP)
        at = lanes + keys.to(tl.int64)[None, :] * stride_lk + lane[:, None]
        right_lanes = tl.load(at, mask=(keys < K)[None, :] & (lane < P)[:, None], other=0.0)
        prior = tl.dot(left_lanes, right_lanes, input_precision=PRECISION) * LOG2_E
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
        smallest = tl.where(seen, content, -FORBIDDEN)
        largest = tl.where(seen, content, FORBIDDEN)
        logits = tl.where(seen, logits, FORBIDDEN)
        others = tl.where((keys == star)[None, :], FORBIDDEN, logits)
        if PRIOR:
            prior = tl.where(seen, prior, FORBIDDEN)
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
        there = tl.max(tl.where(others == rival[:, None], content, FORBIDDEN), 1)
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
    empty = tl.full([BLOCK_Q], EMPTY, tl.float32)
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
    logit_nats = LN_2 if PRIOR else nats
    size = tl.num_programs(1).to(tl.int64) * Q
    out += tl.program_id(1).to(tl.int64) * Q + rows
    inside = rows < Q
    tl.store(out, top * logit_nats + tl.log2(safe) * LN_2, mask=inside)
    tl.store(out + size, (tl.log2(safe) - spread / safe) * LN_2, mask=inside)
    tl.store(out + 2 * size, squares / (safe * safe), mask=inside)
    tl.store(out + 3 * size, low * nats, mask=inside)
    tl.store(out + 6 * size, best * logit_nats, mask=inside)
    if PRIOR:
        tl.store(out + 4 * size, high * nats, mask=inside)
        tl.store(out + 5 * size, score / safe * nats, mask=inside)
        tl.store(out + 7 * size, best_content * nats, mask=inside)
        tl.store(out + 8 * size, (prior_top + tl.log2(tl.where(prior_total > 0, prior_total, 1.0))) * LN_2, mask=inside)
    else:
        tl.store(out + 4 * size, top * nats, mask=inside)
        tl.store(out + 5 * size, top * nats + spread / safe * LN_2, mask=inside)
        tl.store(out + 7 * size, best * nats, mask=inside)
        tl.store(out + 8 * size, zero, mask=inside)


def launch_rows(tiles: ScoreTiles, star: Tensor) -> Tensor:
    """Sweep rows: (NUM_FIELDS, B, H, Q) float32, fields in the order of :class:`eotattn.kernels.score_sums.RowSums`.

    Args:
        tiles: The call.
        star: (B,) index of the key that the competitor is not.
    """
    batch, heads, queries, _ = tiles.query.shape
    block_q, block_k, warps, stages = TILES[tiles.query.element_size(), tiles.query_lanes is not None]
    out = torch.empty(NUM_FIELDS, batch, heads, queries, dtype=torch.float32, device=tiles.query.device)
    unit, nats = units(tiles)
    _rows[(triton.cdiv(queries, block_q), batch * heads)](
        *operands(tiles),
        star.to(torch.int32),
        out,
        *sizes(tiles),
        tiles.scale,
        tiles.softcap or 0.0,
        unit,
        nats,
        **shape(tiles),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )
    return out
