"""Sums over the rows of attention: mass by key and by lag.

Legend: B batch, H heads, Q queries, K keys, r rows and k keys of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention.statistics.score_rows import ScoreBlock, ScoreSource

__all__ = ["ColumnSums"]


@dataclass(frozen=True)
class ColumnSums:
    """Sums over rows, in float64; filled in place, block by block.

    Args:
        mass: (B, H, K) weights by key.
        count: (B, H, K) queries that admit the key.
        lags: (B, H, Q + K - 1) weights by lag, query position - key position, in increasing order.
    """

    mass: Tensor
    count: Tensor
    lags: Tensor

    @classmethod
    def empty(cls, source: ScoreSource) -> ColumnSums:
        """Zeros of the sizes that ``source`` needs."""
        batch, heads, queries, keys = source.shape
        make: dict[str, Any] = {"dtype": torch.float64, "device": source.device}
        zeros = [torch.zeros(batch, heads, size, **make) for size in (keys, keys, queries + keys - 1)]
        return cls(*zeros)

    def add(self, weights: Tensor, block: ScoreBlock, counted: Tensor) -> None:
        """Add the rows of a block that count."""
        keep = counted.to(weights.dtype)[:, None, :, None]
        weights = weights * keep
        rows, width = weights.shape[-2:]
        span = slice(block.first_key, block.first_key + width)
        self.mass[..., span] += weights.sum(-2).double()
        seen = keep if block.admissible is None else block.admissible * keep
        self.count[..., span] += seen.sum(-2).double()
        sheared = functional.pad(weights.flip(-2), (0, rows)).flatten(-2)[..., :-rows]
        by_lag = sheared.unflatten(-1, (rows, width + rows - 1)).sum(-2).flip(-1).double()
        last = block.stop - block.first_key + self.mass.shape[-1] - 1
        self.lags[..., last - by_lag.shape[-1] : last] += by_lag
