"""Relative tables: learned numbers of lags, one for every lag, or one for every bucket of lags.

Legend: H heads, N numbers a head.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from eotattn.checks import check_positive_int
from eotattn.priors.base import LogPrior
from eotattn.priors.far_form import FarForm, Tail
from eotattn.priors.memory import constants

__all__ = ["LagTablePrior", "RelativeBiasPrior"]


class LagTablePrior(LogPrior):
    """A learned table: log_prior = table[head, entry(query_position - key_position)], constant far away on each side.

    A free table is no finite inner product: it has no lanes. Near keys are attended by blocks, far keys by stock calls.
    Starts neutral. A subclass writes :meth:`entry`.

    Args:
        num_heads: Number of query heads H.
        num_entries: Numbers N of a head.
        reach: Lags of this size and more have one number on each side.

    Attributes:
        table: (H, N) nats.
    """

    is_relative = True

    def __init__(self, num_heads: int, num_entries: int, reach: int) -> None:
        super().__init__(num_heads)
        self.reach = reach
        self.table = nn.Parameter(torch.empty(num_heads, num_entries, dtype=torch.float32))
        self.reset_parameters()

    @abstractmethod
    def entry(self, lag: Tensor) -> Tensor:
        """Which number of the table a lag has; int64 whole tokens from -reach to reach, query less key."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Neutral start: a table of zeros."""
        nn.init.zeros_(self.table)

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The table's entry for the lag, in nats; lags are rounded to whole tokens."""
        lag = (query_position - key_position).round().clamp(-self.reach, self.reach)
        return self.table[head, self.entry(lag.to(torch.int64))].to(lag.dtype)

    def far_form(self) -> FarForm:
        """The numbers of the furthest lags."""
        ends = self.entry(constants((self.reach, -self.reach), self.table.device, torch.int64))
        past, future = self.table.index_select(1, ends).unbind(1)
        return FarForm(self.reach, Tail(constant=past), Tail(constant=future))


class RelativeBiasPrior(LagTablePrior):
    """A learned relative table: log_prior = table[head, clamp(query_position - key_position, -max_lag, max_lag)].

    Lags beyond the range take the value at its end, so the prior is flat far away. Every entry whose lag occurs has a
    gradient.

    Args:
        num_heads: Number of query heads H.
        max_lag: Largest lag with an entry of its own, tokens.

    Attributes:
        table: (H, 2 max_lag + 1) nats, lags from -max_lag to max_lag.

    Source:
        Shaw, Uszkoreit and Vaswani 2018 (arXiv 1803.02155), the clipped distance; a number a head instead of a vector.

    Example:
        >>> RelativeBiasPrior(num_heads=2, max_lag=3).table.shape
        torch.Size([2, 7])
    """

    def __init__(self, num_heads: int, max_lag: int) -> None:
        self.max_lag = check_positive_int("RelativeBiasPrior", "max_lag", max_lag, minimum=0)
        super().__init__(num_heads, 2 * max_lag + 1, max_lag)

    def entry(self, lag: Tensor) -> Tensor:
        """The lag's place in the table."""
        return lag + self.max_lag
