"""Weights on keys whose token repeats: duplicate-token and induction scores.

Legend: B batch, N sequences, H heads, Q queries, K keys, r rows and k keys of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention.statistics.block_statistics import block_statistics
from eotattn.attention.statistics.score_rows import ScoreSource, block_spans
from eotattn.checks import check_shape, require

__all__ = ["TokenStatistics"]

OWNER = "TokenStatistics"


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """What the queries of each of N sequences give to keys that their own token points at, on the CPU in float64.

    Attributes:
        duplicate: (N, H) mean weight on earlier keys of the query's own token, over the queries that have one; NaN
            where none has.
        induction: (N, H) mean weight on the keys that follow an earlier key of the query's own token, over the queries
            that have one; NaN where none has.
    """

    duplicate: Tensor
    induction: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        source: ScoreSource,
        token_ids: Tensor,
        *,
        counted: Tensor | None = None,
        sink_logits: Tensor | None = None,
    ) -> TokenStatistics:
        """Sum over one attention call of whole sequences, a block of rows at a time.

        Args:
            source: Its logits, e.g. :class:`~eotattn.attention.statistics.score_rows.ScoreRows`.
            token_ids: (B, K), one a key; as many queries as keys.
            counted: (B, Q) boolean, false where a query is padding.
            sink_logits: (H,), or broadcastable to (B, H, Q): logit of an explicit sink, nats.

        Raises:
            ValueError: If shapes do not fit.

        Source:
            Olsson et al. 2022 (arXiv 2209.11895); Wang et al. 2022 (arXiv 2211.00593) for duplicate tokens.

        Example:
            >>> from eotattn.attention.statistics.score_rows import WeightRows
            >>> rows = WeightRows(torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.1, 0.7, 0.2]])[None, None])
            >>> TokenStatistics.of(rows, torch.tensor([[5, 6, 5]])).induction
            tensor([[0.7000]], dtype=torch.float64)
        """
        batch, heads, queries, keys = source.shape
        square = "have as many queries as keys"
        require(queries == keys, OWNER, "source", square, (queries, keys), "Pass whole sequences")
        check_shape(OWNER, "token_ids", token_ids, (batch, keys), "One id a key")
        ids = token_ids.to(source.device)
        before = functional.pad(ids, (1, -1), value=-1)  # the token before each key; no id is negative
        counts = torch.ones(batch, queries, dtype=torch.bool) if counted is None else counted
        check_shape(OWNER, "counted", counts, (batch, queries), "One entry a query")
        counts, at = counts.to(source.device), torch.arange(keys, device=source.device)
        chosen = torch.zeros(batch, 1, dtype=torch.int64, device=source.device)
        sums = torch.zeros(2, batch, heads, dtype=torch.float64, device=source.device)
        totals = torch.zeros_like(sums)
        for start, stop in block_spans(source):
            block = source.block(start, stop)
            weights, _ = block_statistics(block, chosen, sink_logits, None)
            span = slice(block.first_key, block.first_key + weights.shape[-1])
            own, rows = ids[:, start:stop, None], at[start:stop, None]
            pointed = (
                (own == ids[:, None, span]) & (at[span] < rows),
                (own == before[:, None, span]) & (at[span] <= rows),
            )
            for kind, keys_of_token in enumerate(pointed):
                here = keys_of_token[:, None] & counts[:, None, start:stop, None]
                here = here if block.admissible is None else here & block.admissible
                sums[kind] += torch.where(here, weights, 0.0).sum((-1, -2)).double()
                totals[kind] += here.any(-1).sum(-1)
        means = (sums / totals).cpu()  # 0 / 0 is NaN: no token repeats
        return cls(means[0], means[1])

    def heads(self, index: list[int]) -> TokenStatistics:
        """Only the given heads."""
        return TokenStatistics(self.duplicate[:, index], self.induction[:, index])

    def __add__(self, other: TokenStatistics) -> TokenStatistics:
        """Statistics of the sequences of both, in this order."""
        if not isinstance(other, TokenStatistics):
            return NotImplemented
        pairs = ((self.duplicate, other.duplicate), (self.induction, other.induction))
        return TokenStatistics(*(torch.cat(pair) for pair in pairs))
