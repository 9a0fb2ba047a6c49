"""Admissible keys that are an interval of positions less some keys: counted without a Q x K table.

Legend: B batch, Q queries, K keys, N chosen keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["KeyIntervals"]


@dataclass(frozen=True, eq=False)
class KeyIntervals:
    """Key j is admissible for query i if the mask admits it, ``j <= i + shift`` and ``j > i + shift - window``.

    Args:
        mask: (B, K) boolean, true at keys that may be admissible.
        num_queries: Q.
        shift: Position of the first query less that of the first key, tokens.
        is_causal: Whether the first bound holds.
        window: Of the second bound, tokens; ``None`` for no such bound.
    """

    mask: Tensor
    num_queries: int
    shift: int = 0
    is_causal: bool = False
    window: int | None = None

    def num_keys(self) -> Tensor:
        """(B, Q) admissible keys of each query."""
        last = self._query_places() + 1 if self.is_causal else None
        first = None if self.window is None else self._query_places() - self.window + 1
        return _between(self.mask, first, last, self.num_queries)

    def num_queries_of_keys(self, counted: Tensor) -> Tensor:
        """(B, K) queries that admit each key, among those that count (B, Q)."""
        keys = self.mask.shape[-1]
        place = torch.arange(keys, device=self.mask.device) - self.shift
        last = None if self.window is None else place + self.window
        return _between(counted, place if self.is_causal else None, last, keys) * self.mask

    def admit(self, chosen: Tensor) -> Tensor:
        """(B, Q, N) whether each query admits the keys with the indices ``chosen`` (B, N), which need not exist."""
        exists = (chosen >= 0) & (chosen < self.mask.shape[-1])
        admitted = exists & self.mask.gather(-1, chosen.clamp(0, self.mask.shape[-1] - 1))
        place, chosen = self._query_places()[None, :, None], chosen[:, None, :]
        seen = admitted[:, None, :].expand(-1, self.num_queries, -1)
        seen = seen & (chosen <= place) if self.is_causal else seen
        return seen if self.window is None else seen & (chosen > place - self.window)

    def _query_places(self) -> Tensor:
        return torch.arange(self.num_queries, device=self.mask.device) + self.shift


def _between(flags: Tensor, first: Tensor | None, last: Tensor | None, size: int) -> Tensor:
    """(B, size) flags (B, M) that are set from ``first`` (size,) up to ``last`` (size,), both cut to the flags."""
    sums = functional.pad(flags.long().cumsum(-1), (1, 0))
    end = flags.shape[-1]
    last = torch.full((size,), end, device=flags.device) if last is None else last.clamp(0, end)
    first = torch.zeros_like(last) if first is None else first.clamp(0, end).minimum(last)
    return sums[:, last] - sums[:, first]
