"""The keys that hold most of a query's weight: a token-to-token picture without L x L numbers.

Legend: B batch, N sequences, H heads, Q queries, K keys, C keys kept a query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention.statistics.block_statistics import block_statistics
from eotattn.attention.statistics.score_rows import ScoreSource, block_spans
from eotattn.checks import check_positive_int

__all__ = ["TopKeys"]

OWNER = "TopKeys"


@dataclass(frozen=True, eq=False)
class TopKeys:
    """The strongest keys of the first queries of each of N sequences, on the CPU.

    Attributes:
        key: (N, H, Q, C) int32 indices of keys from the first key of the call, strongest first.
        weight: (N, H, Q, C) float32 weights, in [0, 1]; zero where a query has fewer keys.
    """

    key: Tensor
    weight: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, source: ScoreSource, *, rows: int = 256, count: int = 4, sink_logits: Tensor | None = None) -> TopKeys:
        """Keep the strongest keys of one attention call, a block of rows at a time.

        Args:
            source: Its logits, e.g. :class:`~eotattn.attention.statistics.score_rows.ScoreRows`.
            rows: Queries that are looked at, from the first one on.
            count: Keys C kept a query; fewer where the call has fewer.
            sink_logits: (H,) logit of an explicit sink, nats.

        Raises:
            ValueError: If ``rows`` or ``count`` is not positive.

        Example:
            >>> from eotattn.attention.statistics.score_rows import WeightRows
            >>> top = TopKeys.of(WeightRows(torch.tensor([[1.0, 0.0], [0.2, 0.8]])[None, None]), count=1)
            >>> top.key.flatten().tolist(), top.weight.flatten().tolist()
            ([0, 1], [1.0, 0.800000011920929])
        """
        check_positive_int(OWNER, "rows", rows)
        check_positive_int(OWNER, "count", count)
        batch = source.shape[0]
        chosen = torch.zeros(batch, 1, dtype=torch.int64, device=source.device)
        keys, weights = [], []
        for start, stop in block_spans(source):
            if start >= rows:
                break
            block = source.block(start, min(stop, rows))
            found, _ = block_statistics(block, chosen, sink_logits, None)
            top = found.topk(min(count, found.shape[-1]))
            missing = min(count, source.shape[3]) - top.values.shape[-1]
            keys.append(functional.pad(top.indices + block.first_key, (0, missing)).int().cpu())
            weights.append(functional.pad(top.values, (0, missing)).float().cpu())
        return cls(torch.cat(keys, 2), torch.cat(weights, 2))

    def heads(self, index: list[int]) -> TopKeys:
        """Only the given heads."""
        return TopKeys(self.key[:, index], self.weight[:, index])

    def dense(self, num_keys: int) -> Tensor:
        """(N, H, Q, K) weights with zero for every key that was not kept; keys from ``num_keys`` on are left out."""
        table = torch.zeros(*self.key.shape[:3], num_keys + 1, dtype=self.weight.dtype)
        return table.scatter_add_(-1, self.key.long().clamp(max=num_keys), self.weight)[..., :num_keys]

    def __add__(self, other: TopKeys) -> TopKeys:
        """Those of the sequences of both, in this order; queries and keys that a sequence lacks have weight zero."""
        if not isinstance(other, TopKeys):
            return NotImplemented
        sizes = [max(a, b) for a, b in zip(self.key.shape[2:], other.key.shape[2:], strict=True)]

        def padded(values: Tensor) -> Tensor:
            queries, count = (size - own for size, own in zip(sizes, values.shape[2:], strict=True))
            return functional.pad(values, (0, count, 0, queries))

        pairs = ((self.key, other.key), (self.weight, other.weight))
        return TopKeys(*(torch.cat([padded(a), padded(b)]) for a, b in pairs))
