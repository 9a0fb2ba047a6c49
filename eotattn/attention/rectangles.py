"""The pattern in which every query sees the keys before its own block, as rectangles that stock calls serve.

Legend: B batch, H heads, Q queries, K keys, C queries of a block, S side of a square.

Blocks of C queries see the keys before their own block (less the near ones). Blocks pair up: the later of two siblings
sees the earlier one, as one stock call for all pairs of a size; then pairs of pairs, and so on, log2(Q / C) calls. What
grows with a distance is counted from the edge between siblings, where it stays small or does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention.call import AttentionCall
from eotattn.attention.call_positions import Positions
from eotattn.attention.masks import Masks
from eotattn.priors import LogPrior

__all__ = ["BLOCK", "Rectangle", "reach_of", "rectangles"]

#: Queries of a block.
BLOCK = 128


def reach_of(least: int, before: int, block: int) -> int:
    """The reach, at least ``least``, at which far keys begin at the edges of blocks.

    Args:
        least: Tokens.
        before: Keys before the first query.
        block: Queries of a block.
    """
    return least if before >= least else before + -(-(least - before) // block) * block


@dataclass(frozen=True)
class Rectangle:
    """Pairs of a stretch of queries and one of keys, which become samples of one call.

    Args:
        pairs: How many.
        first_query: Of the first pair.
        size: Queries of a stretch; what the last one lacks is filled up with zeros.
        first_key: Of the first pair.
        width: Keys of a stretch, likewise.
        length: Queries Q of the call.
        period: From one pair to the next, in stretches: two, as siblings take turns, or one.
    """

    pairs: int
    first_query: int
    size: int
    first_key: int
    width: int
    length: int
    period: int = 2

    def queries(self, rows: Tensor) -> Tensor:
        """(B, H, Q, ...) as (B * pairs, H, size, ...)."""
        if self.pairs == 1 and self.size == self.length:
            return rows
        stop = self.first_query + self.period * self.pairs * self.size
        rows = _resized(rows, -self.first_query, stop - self.length, 0.0)
        return rows.unflatten(2, (self.pairs, -1))[:, :, :, : self.size].transpose(1, 2).flatten(0, 1)

    def keys(self, side: Tensor, axis: int = -2, fill: float = 0.0) -> Tensor:
        """(B, ..., K, ...) as (B * pairs, ..., width, ...), keys on the last axis or on the last but one."""
        wanted = (self.period * (self.pairs - 1) + 1) * self.width
        taken = side.narrow(axis, self.first_key, min(wanted, side.shape[axis] - self.first_key))
        if taken.shape[axis] < wanted:
            taken = functional.pad(taken, (*(0, 0) * (-1 - axis), 0, wanted - taken.shape[axis]), value=fill)
        if self.pairs == 1:
            return taken
        return torch.stack(taken.split(self.width, dim=axis)[:: self.period], dim=1).flatten(0, 1)

    def placed(self, rows: Tensor, fill: float) -> Tensor:
        """(B * pairs, H, size, ...) as (B, H, Q, ...) with ``fill`` at other queries."""
        if self.pairs == 1 and self.size == self.length:
            return rows
        rows = rows.unflatten(0, (-1, self.pairs)).transpose(1, 2)
        if self.period == 2:
            rows = torch.cat([rows, torch.full_like(rows, fill)], dim=3)
        rows = rows.flatten(2, 3)
        return _resized(rows, self.first_query, self.length - self.first_query - rows.shape[2], fill)

    def call(
        self, call: AttentionCall, prior: LogPrior | None, query_at: Positions, key_at: Positions, **more: Any
    ) -> AttentionCall:
        """The stock call: all keys of a stretch, seen by all its queries, without sinks and biases of queries."""
        batch = call.query.shape[0]
        padding, of_mask, of_tokens = (
            None if side is None else self.keys(side.expand(batch, *side.shape[1:]), -1)
            for side in (call.masks.padding, call.masks.key_bias, call.key_bias)
        )
        made: dict[str, Any] = {
            "query": self.queries(call.query),
            "key": self.keys(call.key),
            "value": self.keys(call.value),
            "prior": prior,
            "query_positions": query_at,
            "key_positions": key_at,
            "masks": Masks(padding=padding, key_bias=of_mask),
            "key_bias": of_tokens,
            "query_bias": None,
            "sinks": None,
            "return_lse": True,
            "cache": None,
        }
        return replace(call, **{**made, **more})


def _resized(rows: Tensor, before: int, after: int, fill: float) -> Tensor:
    """(B, H, L, ...) with so many more rows, or fewer where a number is negative."""
    return functional.pad(rows, (*(0, 0) * (rows.dim() - 3), before, after), value=fill)


def rectangles(queries: int, keys: int, first: int, block: int) -> Iterator[Rectangle]:
    """What covers all pairs of a query and a key before its block.

    Args:
        queries: Q.
        keys: K.
        first: The first block sees the keys before this one; zero or a negative multiple of the block otherwise.
        block: Queries of a block.
    """
    if first > 0:
        yield Rectangle(1, 0, queries, 0, min(first, keys), queries)
    start, low = max(-first, 0), max(first, 0)
    size = block
    while size < queries - start:
        pairs = -(-(queries - start - size) // (2 * size))
        yield Rectangle(pairs, start + size, size, low, size, queries)
        size *= 2
