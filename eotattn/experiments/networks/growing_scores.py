"""Attention whose scores grow with the logarithm of the number of keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from eotattn.attention import PriorAttention
from eotattn.attention.call_positions import resolve_positions
from eotattn.attention.layer.prior_attention_layer import Heads
from eotattn.checks import check_positive_int

__all__ = ["GrowingScoreAttention"]


class GrowingScoreAttention(PriorAttention):
    """PriorAttention with the score of the query at position i multiplied by max(1, ln(2 + i) / ln(train_length)).

    Softmax over n keys without any signal spreads its mass as 1 / n. A margin of the sought key that grows like ln n
    keeps its share (theorem 5.4 of the paper asks the same of a sink). The factor belongs to the query's own position,
    so it is causal and the same with a cache; within the training length nothing changes. The log-prior is not scaled.

    Args:
        embed_dim: As in :class:`~eotattn.attention.PriorAttention`.
        num_heads: Likewise.
        train_length: Tokens up to which scores stay as they are, at least 2.
        **arguments: The other arguments of :class:`~eotattn.attention.PriorAttention`.

    Source:
        Chiang and Cholak 2022 (arXiv 2202.12172) for ln n; without change inside the training length: original.

    Example:
        >>> layer = GrowingScoreAttention(8, num_heads=2, train_length=16, batch_first=True)
        >>> [round(factor, 3) for factor in layer.factors(torch.tensor([0, 14, 254])).tolist()]
        [1.0, 1.0, 2.0]
    """

    def __init__(self, embed_dim: int, num_heads: int, *, train_length: int, **arguments: Any) -> None:
        super().__init__(embed_dim, num_heads, **arguments)
        self.train_length = check_positive_int(type(self).__name__, "train_length", train_length, minimum=2)

    def factors(self, positions: Tensor) -> Tensor:
        """Factor on the score of the query at each position, float64, at least one."""
        return ((2 + positions.double()).log() / math.log(self.train_length)).clamp(min=1.0)

    def project(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        query_positions: Tensor | range | None = None,
        key_positions: Tensor | range | None = None,
    ) -> Heads:
        """Heads as the base class projects them, with every query times its factor."""
        heads = super().project(query, key, value, query_positions=query_positions, key_positions=key_positions)
        at = resolve_positions(
            type(self).__name__,
            "query_positions",
            query_positions,
            batch=heads.query.shape[0],
            length=heads.query.shape[2],
            num_coordinates=1,
            device=heads.query.device,
        ).tensor
        factor = self.factors(at if at.dim() == 1 else at.unsqueeze(1)).unsqueeze(-1)
        exact = torch.promote_types(heads.query.dtype, torch.float32)
        return heads._replace(query=(heads.query * factor.to(exact)).to(heads.query.dtype))
