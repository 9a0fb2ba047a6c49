"""The Triton kernel of :func:`eotattn.kernels.score_sums.column_sums`: mass by key and by lag.

Legend: B batch, H query heads, G query heads a key head, Q queries, K keys, D score width, P lanes; DP, PP their tiles.

A program walks along block diagonals side by side, on which every entry of a tile keeps its lag from tile to tile: lags
are summed by one addition an entry. Sums over the queries of a tile go to the columns. What several programs share is
added as whole multiples of 2^-40, so that the order in which they finish does not matter.
"""

# mypy: allow-untyped-defs
# ruff: noqa: ANN001, ANN202, N803 - the language of these kernels has types of its own

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from eotattn.kernels.score_tiles import ScoreTiles
from eotattn.kernels.score_tiles_triton import LOG2_E, content_tile, operands, shape, sizes, units

__all__ = ["launch_columns"]

#: Keys of a tile, how many times as many queries, warps and stages, by the bytes of an element and whether there is a
#: prior.
TILES = {(2, False): (64, 2, 4, 3), (2, True): (64, 2, 4, 2), (4, False): (64, 1, 4, 2), (4, True): (64, 1, 4, 2)}
#: Tiles of a block diagonal that one program sums up.
SEGMENT = 128

FIXED_POINT = tl.constexpr(2.0**40)


@triton.jit
def _columns(
    query, key, query_lanes, key_lanes, mask, offsets, mass, lags, Q, K, heads, stride_qb, stride_qh, stride_q,
    stride_kb, stride_kh, stride_k, stride_lqb, stride_lqh, stride_lq, stride_lkb, stride_lkh, stride_lk, shift, window,
    scale, softcap, unit, diagonal, segments,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, SEGMENT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, KEYED: tl.constexpr,
    CAP: tl.constexpr, PRIOR: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Masses of a segment of WIDE block diagonals: tiles of keys x queries whose first lag is the same."""
    diagonal += tl.program_id(0) // segments * WIDE
    sample, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    inner, across, width = tl.arange(0, BLOCK), tl.arange(0, WIDE * BLOCK), tl.arange(0, DP)
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
    first = tl.maximum(0, 1 - WIDE - diagonal)
    last = tl.minimum((K + BLOCK - 1) // BLOCK, (Q + BLOCK - 1) // BLOCK - diagonal)
    first += tl.program_id(0) % segments * SEGMENT
    last = tl.minimum(last, first + SEGMENT)
    by_place = tl.zeros([BLOCK, WIDE * BLOCK], tl.float32)
    rows = (first + diagonal) * BLOCK + across
    upcoming = tl.load(offsets + rows, mask=(rows >= 0) & (rows < Q), other=float("inf"))
    for block in range(first, last):
        offset = upcoming  # the next ones travel while this tile is multiplied
        keys, rows = block * BLOCK + inner, (block + 1 + diagonal) * BLOCK + across
        upcoming = tl.load(offsets + rows, mask=(rows >= 0) & (rows < Q), other=float("inf"))
        rows -= BLOCK
        exist = (rows >= 0) & (rows < Q)
        key_at = key + keys.to(tl.int64)[:, None] * stride_k + width[None, :]
        query_at = query + rows.to(tl.int64)[None, :] * stride_q + width[:, None]
        if MASKED:
            left = tl.load(key_at, mask=(keys < K)[:, None] & (width < D)[None, :], other=0.0)
        elif DP == D:
            left = tl.load(key_at)
        else:
            left = tl.load(key_at, mask=(width < D)[None, :], other=0.0)
        right = tl.load(query_at, mask=exist[None, :] & (width < D)[:, None], other=0.0)
        logits = content_tile(left, right, scale, softcap, CAP, PRECISION) * unit
        if PRIOR:
            left = tl.load(
                key_lanes + keys.to(tl.int64)[:, None] * stride_lk + lane[None, :],
                mask=(keys < K)[:, None] & (lane < P)[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                query_lanes + rows.to(tl.int64)[None, :] * stride_lq + lane[:, None],
                mask=exist[None, :] & (lane < P)[:, None], other=0.0,
            )  # fmt: skip
            logits += tl.dot(left, right, input_precision=PRECISION) * LOG2_E
        logits -= offset[None, :]
        if MASKED:
            seen = (keys < K)[:, None] & exist[None, :]
            if CAUSAL:
                seen &= keys[:, None] <= (rows + shift)[None, :]
            if WINDOW:
                seen &= keys[:, None] > (rows + shift - window)[None, :]
            if KEYED:
                seen &= (tl.load(mask + keys, mask=keys < K, other=0) != 0)[:, None]
            logits = tl.where(seen, logits, -float("inf"))
        weight = tl.exp2(logits)
        by_place += weight
        found = (tl.sum(weight, 1) * FIXED_POINT).to(tl.int64)
        tl.atomic_add(mass + keys, found, mask=keys < K, sem="relaxed")
    lag = diagonal * BLOCK + across[None, :] - inner[:, None] + K - 1
    inside = (lag >= 0) & (lag < Q + K - 1) & (by_place > 0)
    tl.atomic_add(lags + lag, (by_place * FIXED_POINT).to(tl.int64), mask=inside, sem="relaxed")


def launch_columns(tiles: ScoreTiles, log_sum_exp: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Sweep diagonals: mass by key (B, H, K) and by lag (B, H, Q + K - 1), float64.

    Args:
        tiles: The call.
        log_sum_exp: (B, H, Q) nats; -inf where a query has no keys.
        counted: (B, Q) boolean, queries whose weights are summed.
    """
    batch, heads, queries, _ = tiles.query.shape
    keys = tiles.key.shape[2]
    block, wide, warps, stages = TILES[tiles.query.element_size(), tiles.query_lanes is not None]
    summed = counted[:, None, :] & (log_sum_exp > -math.inf)
    offsets = torch.where(summed, log_sum_exp * LOG2_E.value, math.inf)
    mass, lags = (
        torch.zeros(batch, heads, size, dtype=torch.int64, device=tiles.query.device)
        for size in (keys, queries + keys - 1)
    )
    segments = triton.cdiv(triton.cdiv(min(queries, keys), block) + wide - 1, SEGMENT)
    for first, last, masked in _diagonals(tiles, block, wide):
        _columns[((last - first) // wide * segments, batch * heads)](
            *operands(tiles),
            offsets,
            mass,
            lags,
            *sizes(tiles),
            tiles.scale,
            tiles.softcap or 0.0,
            units(tiles)[0],
            first,
            segments,
            **shape(tiles),
            MASKED=masked,
            BLOCK=block,
            WIDE=wide,
            SEGMENT=SEGMENT,
            num_warps=warps,
            num_stages=stages,
        )
    return mass.double() / FIXED_POINT.value, lags.double() / FIXED_POINT.value


def _diagonals(tiles: ScoreTiles, block: int, wide: int) -> list[tuple[int, int, bool]]:
    """Spans of block diagonals (query block - key block) that hold admissible pairs, and whether they need a mask.

    Spans begin and end at multiples of ``wide``. Lags of diagonal d run from ``d block + shift - (block - 1)`` to
    ``d block + shift + block - 1``.
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
    first, last = first // wide * wide, triton.cdiv(last, wide) * wide
    clear = min(max(triton.cdiv(clear, wide) * wide, first), last)
    limit = min(max(limit // wide * wide, clear), last)
    spans = [(first, clear, True), (clear, limit, False), (limit, last, True)]
    return [span for span in spans if span[0] < span[1]]
