"""Sums over the softmax of scores, by row, by key and by lag, where a kernel makes them without storing a score.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, P lanes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from eotattn.kernels.score_tiles import ScoreTiles

__all__ = ["RowSums", "column_sums", "refusal", "row_sums"]

#: The widest scores and lanes that a tile holds.
WIDEST = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Shared memory that the largest tile takes, bytes; processors since Hopper have it.
SHARED_MEMORY = 200 * 1024
#: Heads of all samples together that one launch holds.
MOST_HEADS = 65535


@dataclass(frozen=True, eq=False)
class RowSums:
    """Of each row over its admissible keys, without an explicit sink; (B, H, Q) float32, undefined in rows without.

    Attributes:
        log_sum_exp: nats.
        entropy: nats.
        participation: Sum of squared weights.
        score_min: Smallest content, nats.
        score_max: Largest content, nats.
        expected_score: Mean content, nats.
        rival: Largest logit among the other keys than the chosen one, nats.
        rival_score: Its content, nats; the larger one where several share that logit.
        prior_log_sum_exp: ln sum_j exp(<query lanes, key lanes>), nats; zero without lanes.
    """

    log_sum_exp: Tensor
    entropy: Tensor
    participation: Tensor
    score_min: Tensor
    score_max: Tensor
    expected_score: Tensor
    rival: Tensor
    rival_score: Tensor
    prior_log_sum_exp: Tensor


def refusal(tiles: ScoreTiles) -> str | None:
    """Why no kernel serves the call, or ``None`` if one does.

    Example:
        >>> refusal(ScoreTiles(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), scale=1.0))
        'the tensors are on cpu; the kernel runs on CUDA'
    """
    if tiles.query.device.type != "cuda" and not _interpreted():
        return f"the tensors are on {tiles.query.device.type}; the kernel runs on CUDA"
    if not _kernels():
        return "Triton is not installed"
    if not _interpreted() and _kernels()[2](tiles.query.device) < SHARED_MEMORY:
        return f"the device has less than {SHARED_MEMORY // 1024} KiB of shared memory a block"
    heads = tiles.query.shape[0] * tiles.query.shape[1]
    if heads > MOST_HEADS:
        return f"{heads} heads of all samples; a launch holds {MOST_HEADS}"
    if tiles.query.dtype not in DTYPES or tiles.key.dtype != tiles.query.dtype:
        return f"the kernel multiplies one of bfloat16, float16 and float32; got {tiles.query.dtype}, {tiles.key.dtype}"
    lanes = 0 if tiles.query_lanes is None else tiles.query_lanes.shape[-1]
    if max(tiles.query.shape[-1], lanes) > WIDEST:
        return f"scores of width {tiles.query.shape[-1]} and {lanes} lanes; a tile holds {WIDEST} of each"
    return None


def row_sums(tiles: ScoreTiles, chosen: Tensor) -> RowSums:
    """Sum over the keys of every row, in one sweep.

    Args:
        tiles: A call that :func:`refusal` does not refuse.
        chosen: (B,) index of the key that is no rival of itself; any other number where there is none.

    Source: online softmax, Milakov and Gimelshein 2018, carried on to further sums.
    """
    return RowSums(*_kernels()[0](_contiguous(tiles), chosen))


def column_sums(tiles: ScoreTiles, log_sum_exp: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Sum ``exp(logit_ij - log_sum_exp_i)`` over the queries that count, in a second sweep.

    Every sum is exact to 2^-40 a tile and does not depend on the order in which programs finish.

    Args:
        tiles: A call that :func:`refusal` does not refuse.
        log_sum_exp: (B, H, Q) float32, nats; rows of -inf have no weights.
        counted: (B, Q) boolean.

    Returns:
        Mass by key (B, H, K), and by lag i - j, from the smallest: (B, H, Q + K - 1); float64.

    Source: original.
    """
    found: tuple[Tensor, Tensor] = _kernels()[1](_contiguous(tiles), log_sum_exp, counted)
    return found


def _contiguous(tiles: ScoreTiles) -> ScoreTiles:
    """Rows that a kernel can read: entries side by side."""
    names = ("query", "key", "query_lanes", "key_lanes")
    sides = {name: getattr(tiles, name) for name in names}
    dense = {name: side if side is None or side.stride(-1) == 1 else side.contiguous() for name, side in sides.items()}
    return replace(tiles, **dense)


@cache
def _kernels() -> tuple[Any, ...]:
    """What launches the kernels of rows and of columns, and the shared memory of a device; nothing without Triton."""
    try:
        from eotattn.kernels.column_sums_triton import launch_columns
        from eotattn.kernels.row_sums_triton import launch_rows
        from eotattn.kernels.score_tiles_triton import shared_memory
    except ImportError:
        return ()
    return launch_rows, launch_columns, shared_memory


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python, which serves tensors on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
