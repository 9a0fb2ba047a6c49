"""What a prior reads from the tokens themselves: numbers of keys, of queries, and factors of a query's own.

Legend: B batch, H heads, Q queries, K keys, E width of a token, N numbers kept of a token.

A log-prior of positions is the same for every text. One that reads the tokens adds to it what bilinear lanes carry as
exactly: a bias of every key, a bias of every query (a constant of its row), and a factor of every query on the terms of
a prior of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Reading", "Tokens", "expand_heads", "join_readings"]


class Tokens(NamedTuple):
    """The tokens of one attention call, as a layer sees them.

    Args:
        query: (B, Q, E), the layer's input on the queries' side.
        key: (B, K, E'), the same on the keys' side; in self-attention the very same object.
        padding: (B, K) boolean, true where a key is padding; ``None`` for none.
        document_positions: (1 or B, K) position of each token in its own document; ``None`` for one document a row.
        before: (B, N) float64, what was kept of the last token of an earlier chunk; ``None`` at the first one.
    """

    query: Tensor
    key: Tensor
    padding: Tensor | None = None
    document_positions: Tensor | None = None
    before: Tensor | None = None


class Reading(NamedTuple):
    """What a prior read.

    Args:
        key_bias: (B, H, K) or (B, Hk, K), nats, added to every score of a key.
        query_bias: (B, H, Q), nats, added to every score of a query: softmax does not see it, its gradient does.
        query_gains: One factor (B, H, Q) for each of the prior's terms, dimensionless, or ``None`` where it is one.
        kept: (B, N, K) float64: what later chunks go on from.
    """

    key_bias: Tensor | None = None
    query_bias: Tensor | None = None
    query_gains: tuple[Tensor | None, ...] = ()
    kept: Tensor | None = None

    def of_heads(self, num_heads: int) -> Reading:
        """The same with a number of its own for every one of ``num_heads`` query heads."""
        return self if self.key_bias is None else self._replace(key_bias=expand_heads(self.key_bias, num_heads))

    def weighted(self, change: Callable[[Tensor], Tensor]) -> Reading:
        """The same with ``change``, a map of (B, H, L, 1) numbers, applied to the biases."""
        return self._replace(key_bias=_changed(self.key_bias, change), query_bias=_changed(self.query_bias, change))

    def with_gains(self, change: Callable[[Tensor], Tensor]) -> Reading:
        """The same with ``change`` applied to the factors."""
        return self._replace(query_gains=tuple([_changed(gain, change) for gain in self.query_gains]))


def join_readings(readings: Sequence[Reading]) -> Reading:
    """What the sum of several priors reads: biases are added, factors and what is kept stand side by side."""
    kept = [reading.kept for reading in readings if reading.kept is not None]
    return Reading(
        key_bias=_sum([reading.key_bias for reading in readings]),
        query_bias=_sum([reading.query_bias for reading in readings]),
        query_gains=tuple([gain for reading in readings for gain in reading.query_gains]),
        kept=torch.cat(kept, dim=1) if kept else None,
    )


def _sum(biases: Sequence[Tensor | None]) -> Tensor | None:
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    num_heads = max(bias.shape[1] for bias in given)
    total = expand_heads(given[0], num_heads)
    for bias in given[1:]:
        total = total + expand_heads(bias, num_heads)
    return total


def expand_heads(bias: Tensor, num_heads: int) -> Tensor:
    """(B, H, L) from biases of heads that consecutive query heads share."""
    count = bias.shape[1]
    return bias if count == num_heads else bias.repeat_interleave(num_heads // count, dim=1)


def _changed(numbers: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if numbers is None else change(numbers.unsqueeze(-1)).squeeze(-1)
