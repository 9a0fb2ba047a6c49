"""What the Triton kernels of :mod:`eotattn.kernels.score_sums` share: a tile of content, and a call as their arguments.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, P lanes; DP, PP their tiles.

Products come from tensor cores; everything else happens in registers, in base two.
"""

# mypy: allow-untyped-defs
# ruff: noqa: ANN001, ANN201, N803 - the language of these kernels has types of its own

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from eotattn.kernels.score_tiles import ScoreTiles

__all__ = [
    "EMPTY",
    "FORBIDDEN",
    "LN_2",
    "LOG2_E",
    "content_tile",
    "operands",
    "shape",
    "shared_memory",
    "sizes",
    "units",
]

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
#: Below every logit, and below that; finite, so that nothing that is multiplied by a weight of zero becomes NaN.
EMPTY, FORBIDDEN = tl.constexpr(-1e30), tl.constexpr(-2e30)


@triton.jit
def content_tile(left, right, scale, softcap, CAP: tl.constexpr, PRECISION: tl.constexpr):
    """Content of a tile: raw inner products, or capped scores in base two."""
    content = tl.dot(left, right, input_precision=PRECISION)
    if CAP:
        # tanh(u) = 1 - 2 / (1 + exp(2 u))
        grown = tl.exp2(content * (scale / softcap * 2.0 * LOG2_E))
        content = (softcap * LOG2_E) * (1.0 - 2.0 / (1.0 + grown))
    return content


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block of threads can have."""
    index = torch.cuda.current_device() if device.index is None else device.index
    found: int = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return found


def units(tiles: ScoreTiles) -> tuple[float, float]:
    """What turns the content of a tile into base two, and into nats."""
    return (tiles.scale * LOG2_E.value, tiles.scale) if tiles.softcap is None else (1.0, LN_2.value)


def operands(tiles: ScoreTiles) -> tuple[Tensor, ...]:
    """Query, key, their lanes, and the key mask; anything in place of what there is not."""
    query_lanes = tiles.query if tiles.query_lanes is None else tiles.query_lanes
    key_lanes = tiles.key if tiles.key_lanes is None else tiles.key_lanes
    mask = tiles.query if tiles.key_mask is None else tiles.key_mask.to(torch.int8)
    return tiles.query, tiles.key, query_lanes, key_lanes, mask


def sizes(tiles: ScoreTiles) -> tuple[int, ...]:
    """Q, K and H, strides of the operands, shift and window."""
    query, key, query_lanes, key_lanes, _ = operands(tiles)
    strides = [side.stride()[:3] for side in (query, key, query_lanes, key_lanes)]
    sizes = (query.shape[2], key.shape[2], query.shape[1])
    return *sizes, *(step for side in strides for step in side), tiles.shift, tiles.window or 0


def shape(tiles: ScoreTiles) -> dict[str, object]:
    """What a kernel is compiled for, besides its tile."""
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
