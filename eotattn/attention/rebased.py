"""Far keys of a prior that decays smoothly: rectangles of stock calls, exponentials counted from the edge of each.

Legend: B batch, H heads, Q queries, K keys, V value width, C queries of a block, S side of a square.

Blocks of C queries see the keys before their own block (less the near ones). Blocks pair up: the later of two siblings
sees the earlier one, as one stock call for all pairs of a size; then pairs of pairs, and so on, log2(Q / C) calls. The
exponential of a lag is the product of two of distances from the edge between siblings, both at most one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention.call import AttentionCall
from eotattn.attention.call_positions import Positions
from eotattn.attention.masks import Masks
from eotattn.priors import LogPrior

__all__ = ["BLOCK", "Part", "Side", "parts", "reach_of"]

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
class Side:
    """Queries and keys, the far ones before the query: as they are, or in reverse.

    Args:
        call: The call, its tokens in that order.
        first: The first query sees the keys before this one; zero or a negative multiple of the block otherwise.
        block: Queries of a block.
    """

    call: AttentionCall
    first: int
    block: int


@dataclass(frozen=True)
class Part:
    """One stock call, and where its rows belong.

    Args:
        call: B times ``pairs`` samples.
        pairs: Pairs of siblings.
        start: First query of all.
        size: Queries of a sibling; the earlier siblings have none.
        length: Queries Q.
    """

    call: AttentionCall
    pairs: int
    start: int
    size: int
    length: int

    def placed(self, rows: Tensor, fill: float) -> Tensor:
        """(B * pairs, H, size, ...) as (B, H, Q, ...) with ``fill`` at other queries."""
        rows = rows.unflatten(0, (-1, self.pairs)).transpose(1, 2)
        if self.pairs == 1 and self.start == 0 and self.size == self.length:
            return rows.flatten(2, 3)
        rest = rows.new_full((*rows.shape[:3], self.size, *rows.shape[4:]), fill)
        both = torch.cat([rest, rows], dim=3).flatten(2, 3)
        short = self.length - self.start - both.shape[2]
        trailing = (0, 0) * (both.dim() - 3)
        return functional.pad(both, (*trailing, self.start, short), value=fill)


def parts(side: Side, prior: LogPrior) -> Iterator[Part]:
    """The stock calls for the far keys of one side."""
    call, first = side.call, side.first
    queries, keys = call.query.shape[2], call.key.shape[2]
    if first > 0:
        seen = min(first, keys)
        at = Positions(None, first - seen, queries, call.query.device)
        yield Part(_call(call, prior, call.query, slice(0, seen), 1, at), 1, 0, queries, queries)
    start, low = max(-first, 0), max(first, 0)
    size = side.block
    while size < queries - start:
        pairs = -(-(queries - start - size) // (2 * size))
        rows = call.query[:, :, start + size :]
        rows = functional.pad(rows, (0, 0, 0, pairs * 2 * size - rows.shape[2]))
        rows = rows.unflatten(2, (pairs, 2 * size))[:, :, :, :size].transpose(1, 2).flatten(0, 1)
        at = Positions(None, 0, size, call.query.device)
        columns = slice(low, low + (2 * pairs - 1) * size)
        yield Part(_call(call, prior, rows, columns, pairs, at), pairs, start, size, queries)
        size *= 2


def _call(
    call: AttentionCall, prior: LogPrior, query: Tensor, columns: slice, pairs: int, at: Positions
) -> AttentionCall:
    """The call of ``pairs`` samples each: every other stretch of the keys in ``columns``."""
    size = (columns.stop - columns.start) // (2 * pairs - 1)

    def stretches(side: Tensor, axis: int) -> Tensor:
        taken = side.narrow(axis, columns.start, columns.stop - columns.start)
        if pairs == 1:
            return taken
        chosen = torch.stack(taken.split(size, dim=axis)[::2], dim=1)
        return chosen.flatten(0, 1)

    batch = call.query.shape[0]
    padding, of_mask, of_tokens = (
        None if side is None else stretches(side.expand(batch, *side.shape[1:]), -1)
        for side in (call.masks.padding, call.masks.key_bias, call.key_bias)
    )
    distances = torch.arange(size, 0, -1, device=query.device)
    return replace(
        call,
        query=query,
        key=stretches(call.key, 2),
        value=stretches(call.value, 2),
        prior=prior,
        query_positions=at,
        key_positions=Positions(distances, None, size, query.device),
        masks=Masks(padding=padding, key_bias=of_mask),
        key_bias=of_tokens,
        query_bias=None,
        sinks=None,
        return_lse=True,
        cache=None,
    )
