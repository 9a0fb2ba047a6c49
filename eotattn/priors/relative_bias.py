"""RelativeBiasPrior: one learned number for every lag."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eotattn.checks import check_positive_int
from eotattn.priors.base import LogPrior

__all__ = ["RelativeBiasPrior"]


class RelativeBiasPrior(LogPrior):
    """A learned relative table: log_prior = table[head, clamp(query_position - key_position, -max_lag, max_lag)].

    Lags beyond the range take the value at its end, so the prior is flat far away. A free table is no finite inner
    product: it has no lanes. Starts neutral, and every entry whose lag occurs has a gradient.

    Args:
        num_heads: Number of query heads H.
        max_lag: Largest lag with an entry of its own, tokens.

    Attributes:
        table: (H, 2 max_lag + 1) nats, lags from -max_lag to max_lag.

    Source:
        Relative biases in the manner of Raffel et al. 2020 (arXiv 1910.10683), without buckets.

    Example:
        >>> RelativeBiasPrior(num_heads=2, max_lag=3).table.shape
        torch.Size([2, 7])
    """

    def __init__(self, num_heads: int, max_lag: int) -> None:
        super().__init__(num_heads)
        self.max_lag = check_positive_int("RelativeBiasPrior", "max_lag", max_lag, minimum=0)
        self.table = nn.Parameter(torch.empty(num_heads, 2 * max_lag + 1, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Neutral start: a table of zeros."""
        nn.init.zeros_(self.table)

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The table's entry for the lag, in nats; lags are rounded to whole tokens."""
        lag = (query_position - key_position).round().clamp(-self.max_lag, self.max_lag)
        return self.table[head, lag.to(torch.int64) + self.max_lag].to(lag.dtype)
