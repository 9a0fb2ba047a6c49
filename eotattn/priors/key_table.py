"""KeyTablePrior: one learned number for every key position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eotattn.checks import check_positive_int
from eotattn.priors.base import LogPrior
from eotattn.priors.terms import KeyTerm, Term, same_for_all_queries

__all__ = ["KeyTablePrior"]


class KeyTablePrior(LogPrior):
    """A learned key-only table: log_prior = table[head, clamp(key_position, 0, length - 1)].

    Positions beyond the table take its last entry, so that the prior is flat far away. A query-independent default is a
    rank-one log-prior: it needs exactly one lane. Starts neutral.

    Args:
        num_heads: Number of query heads H.
        length: Positions with an entry of their own, tokens.

    Attributes:
        table: (H, length) nats.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), appendix F, theorem 4, with a free u(j).

    Example:
        >>> KeyTablePrior(num_heads=2, length=5).table.shape
        torch.Size([2, 5])
    """

    def __init__(self, num_heads: int, length: int) -> None:
        super().__init__(num_heads)
        self.length = check_positive_int("KeyTablePrior", "length", length)
        self.table = nn.Parameter(torch.empty(num_heads, length, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Neutral start: a table of zeros."""
        nn.init.zeros_(self.table)

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The table's entry for the key, in nats; positions are rounded to whole tokens."""
        index = key_position.round().clamp(0, self.length - 1).to(torch.int64)
        return self.table[head, index].to(key_position.dtype) + torch.zeros_like(query_position)

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """One term: u(j), the same for every query."""
        return (KeyTerm(same_for_all_queries(1), self._of_keys),)

    def _of_keys(self, positions: Tensor) -> Tensor:
        index = positions.double().round().clamp(0, self.length - 1).to(torch.int64)
        return self.table[:, index].movedim(0, -2)  # (H, K) or (H, B, K) before
