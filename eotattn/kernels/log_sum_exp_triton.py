"""The row log-sum-exp alone, in one Triton kernel: no values, and a bias a key in float32 instead of lanes.

Legend: N rows, M keys, D score width.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch"]

#: Rows and keys of one tile, warps and stages, the fastest of nine on an H200 at width 64; the second for widths
#: above 64 in float32, whose tiles would not fit the shared memory.
_TILES = {torch.bfloat16: (128, 128, 4, 3), torch.float32: (128, 128, 8, 3)}
_NARROW_TILE = (64, 64, 4, 2)


# fmt: off
@triton.jit
def _rows(query, key, bias, out, N, M, stride_qb, stride_qn, stride_kb, stride_km, stride_bb, scale, D: tl.constexpr, DP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E501, ANN001, ANN202, N803
    """One tile of rows against all keys, in base two."""
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keys, width = tl.arange(0, BLOCK_M), tl.arange(0, DP)
    wide = width < D
    at = query + batch * stride_qb + rows.to(tl.int64)[:, None] * stride_qn + width[None, :]
    left = tl.load(at, mask=(rows < N)[:, None] & wide[None, :], other=0.0)
    top = tl.full([BLOCK_N], -1e30, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    right_at = key + batch * stride_kb + keys.to(tl.int64)[None, :] * stride_km + width[:, None]
    bias_at = bias + batch * stride_bb + keys
    for start in range(0, M, BLOCK_M):
        if EVEN:
            right = tl.load(right_at)
            shift = tl.load(bias_at)
        else:
            inside = start + keys < M
            right = tl.load(right_at, mask=inside[None, :] & wide[:, None], other=0.0)
            shift = tl.load(bias_at, mask=inside, other=-float("inf"))
        logits = tl.dot(left, right, input_precision=PRECISION) * scale + shift[None, :]
        peak = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - peak) + tl.sum(tl.exp2(logits - peak[:, None]), 1)
        top = peak
        right_at += BLOCK_M * stride_km
        bias_at += BLOCK_M
    found = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(out + batch * N + rows, found, mask=rows < N)
# fmt: on


def launch(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Compute ``log sum_m exp(scale <query_n, key_m> + bias_m)``.

    Args:
        query: (B, N, D), bfloat16 or float32 on CUDA, last axis contiguous.
        key: (B, M, D), the same dtype.
        bias: (B, M), nats, float32, finite.
        scale: Factor on the inner products.

    Returns:
        (B, N), nats, float32.
    """
    batch, length, width = query.shape
    num_keys = key.shape[1]
    padded = max(16, triton.next_power_of_2(width))
    fits = query.dtype == torch.bfloat16 or padded <= 64
    block_n, block_m, warps, stages = _TILES[query.dtype] if fits else _NARROW_TILE
    out = torch.empty(batch, length, dtype=torch.float32, device=query.device)
    binary = math.log2(math.e)
    _rows[(triton.cdiv(length, block_n), batch)](
        query,
        key,
        bias * binary,
        out,
        length,
        num_keys,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        bias.shape[1],
        scale * binary,
        D=width,
        DP=padded,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        # Three tf32 products make a float32 one, to 2e-6 nats.
        PRECISION="ieee" if query.dtype == torch.bfloat16 else "tf32x3",
        EVEN=num_keys % block_m == 0 and padded == width,
        num_warps=warps,
        num_stages=stages,
    )
    return out
