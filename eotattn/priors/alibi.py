"""AlibiPrior: ALiBi's fixed slopes in both directions."""

from __future__ import annotations

from torch import Tensor

from eotattn.priors.base import LogPrior
from eotattn.priors.far_form import FarForm, Tail
from eotattn.priors.recency import RecencyPrior

__all__ = ["AlibiPrior"]


class AlibiPrior(LogPrior):
    """ALiBi: log_prior = -slope * |query_position - key_position|, fixed slopes, symmetric as in encoders.

    It is linear on each side of the query: two stock calls with lanes, merged, and under a causal mask one. There it
    equals ``RecencyPrior(num_heads).freeze()``, which has lanes everywhere.

    Args:
        num_heads: Number of query heads H.

    Attributes:
        recency: The log-prior of keys at or before the query; frozen.

    Source:
        Press, Smith and Lewis 2022 (arXiv 2108.12409); symmetric as the authors advise for encoders.

    Example:
        >>> import torch
        >>> AlibiPrior(8).dense(torch.tensor([3]), torch.tensor([1, 3, 4]))[0]
        tensor([[-1.0000,  0.0000, -0.5000]])
    """

    is_relative = True

    def __init__(self, num_heads: int) -> None:
        super().__init__(num_heads)
        self.recency = RecencyPrior(num_heads).freeze()

    def reset_parameters(self) -> None:
        """ALiBi's slopes."""
        self.recency.reset_parameters()

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The recency prior of the lag's size, in nats."""
        lag = (query_position - key_position).abs()
        return self.recency.log_prior(head, lag, lag.new_zeros(()))

    def far_form(self) -> FarForm:
        """Recency before the query, and its negative after it."""
        return FarForm(0, Tail(self.recency), Tail(-self.recency))
