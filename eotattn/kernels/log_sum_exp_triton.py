"""The row log-sum-exp alone, in one Triton kernel: no values, and a bias a key in float32 instead of lanes.

Legend: N rows, M keys, D score width, S spans of keys.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch"]

#: Rows and keys of one tile, warps, stages, and tiles that one multiprocessor holds, the fastest of nine on an H200 at
#: width 64; the last for widths above 64 in float32, whose tiles would not fit the shared memory.
_TILES = {torch.bfloat16: (128, 128, 4, 3, 2), torch.float32: (128, 128, 8, 3, 1)}
_NARROW_TILE = (64, 64, 4, 2, 1)
#: Most spans that the keys are divided into where there are too few rows to keep a GPU busy.
_MOST_SPANS = 8


# fmt: off
@triton.jit
def _absorb(left, right, shift, top, total, scale, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, N803
    """One tile of keys, in base two: a bias of -inf removes a key."""
    logits = tl.dot(left, right, input_precision=PRECISION) * scale + shift[None, :] * 1.4426950408889634
    peak = tl.maximum(top, tl.max(logits, 1))
    return peak, total * tl.exp2(top - peak) + tl.sum(tl.exp2(logits - peak[:, None]), 1)


@triton.jit
def _rows(query, key, bias, out, N, M, SPAN, B, stride_qb, stride_qn, stride_kb, stride_km, stride_bb, scale, D: tl.constexpr, DP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E501, ANN001, ANN202, N803
    """One tile of rows against one span of keys."""
    batch, span = tl.program_id(1).to(tl.int64), tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keys, width = tl.arange(0, BLOCK_M), tl.arange(0, DP)
    wide = width < D
    at = query + batch * stride_qb + rows.to(tl.int64)[:, None] * stride_qn + width[None, :]
    left = tl.load(at, mask=(rows < N)[:, None] & wide[None, :], other=0.0)
    top = tl.full([BLOCK_N], -1e30, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    begin = span * SPAN
    end = tl.minimum(begin + SPAN, M)
    whole = begin + (end - begin) // BLOCK_M * BLOCK_M
    right_at = key + batch * stride_kb + (begin + keys).to(tl.int64)[None, :] * stride_km + width[:, None]
    bias_at = bias + batch * stride_bb + begin + keys
    for _ in range(begin, whole, BLOCK_M):
        if D == DP:  # noqa: SIM108
            right = tl.load(right_at)
        else:
            right = tl.load(right_at, mask=wide[:, None], other=0.0)
        top, total = _absorb(left, right, tl.load(bias_at), top, total, scale, PRECISION)
        right_at += BLOCK_M * stride_km
        bias_at += BLOCK_M
    if whole < end:
        inside = whole + keys < end
        right = tl.load(right_at, mask=inside[None, :] & wide[:, None], other=0.0)
        shift = tl.load(bias_at, mask=inside, other=-float("inf"))
        top, total = _absorb(left, right, shift, top, total, scale, PRECISION)
    found = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(out + (span * B + batch) * N + rows, found, mask=rows < N)


@triton.jit
def _join_spans(parts, out, S, SIZE, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, N803
    """The log-sum-exp over spans."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(S):
        part = tl.load(parts + s * SIZE + at, mask=at < SIZE, other=0.0)
        peak = tl.maximum(top, part)
        total = total * tl.exp(top - peak) + tl.exp(part - peak)
        top = peak
    tl.store(out + at, top + tl.log(total), mask=at < SIZE)
# fmt: on


def launch(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Compute ``log sum_m exp(scale <query_n, key_m> + bias_m)``.

    float32 products keep 21 bits by three TensorFloat-32 products, or 10 bits by one where
    ``torch.set_float32_matmul_precision`` allows it.

    Args:
        query: (B, N, D), bfloat16 or float32 on CUDA, last axis contiguous.
        key: (B, M, D), the same dtype.
        bias: (B, M), nats, float32; -inf removes a key.
        scale: Factor on the inner products.

    Returns:
        (B, N), nats, float32; -inf where no key is left.
    """
    batch, length, width = query.shape
    num_keys = key.shape[1]
    padded = max(16, triton.next_power_of_2(width))
    fits = query.dtype == torch.bfloat16 or padded <= 64
    block_n, block_m, warps, stages, resident = _TILES[query.dtype] if fits else _NARROW_TILE
    tiles, resident = triton.cdiv(length, block_n), resident if padded <= 64 else 1
    span = _span(num_keys, block_m, tiles * batch, resident * _multiprocessors(query.device))
    spans = triton.cdiv(num_keys, span)
    parts = torch.empty(spans, batch, length, dtype=torch.float32, device=query.device)
    strides = (*query.stride()[:2], *key.stride()[:2], bias.stride(0))
    _rows[(tiles, batch, spans)](
        query,
        key,
        bias,
        parts,
        length,
        num_keys,
        span,
        batch,
        *strides,
        scale * math.log2(math.e),
        D=width,
        DP=padded,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        PRECISION=_precision(query.dtype),
        num_warps=warps,
        num_stages=stages,
    )
    if spans == 1:
        return parts[0]
    out = torch.empty(batch, length, dtype=torch.float32, device=query.device)
    _join_spans[(triton.cdiv(out.numel(), 256),)](parts, out, spans, out.numel(), BLOCK=256, num_warps=4)
    return out


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.bfloat16:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _span(num_keys: int, block: int, tiles: int, slots: int) -> int:
    """Keys of one span, a multiple of ``block``: few rounds of ``slots`` tiles, times their length."""
    most = min(_MOST_SPANS, triton.cdiv(num_keys, block))
    count = min(range(1, most + 1), key=lambda s: (triton.cdiv(tiles * s, slots) * triton.cdiv(num_keys, s * block), s))
    return int(triton.cdiv(triton.cdiv(num_keys, count), block) * block)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
