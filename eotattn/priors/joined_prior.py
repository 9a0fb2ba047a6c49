"""JoinedPrior: the heads of several priors side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.priors.base import CombinedPrior, LogPrior, checked_parts, read_each
from eotattn.priors.reading import Reading, Tokens, join_readings
from eotattn.priors.terms import KeyTerm, Term

__all__ = ["JoinedPrior"]


class JoinedPrior(CombinedPrior):
    """The heads of several priors side by side, as one prior: the first part's heads come first.

    Args:
        parts: At least one prior; all on positions of one kind.

    Example:
        >>> from eotattn.priors import FourierPrior, RecencyPrior
        >>> JoinedPrior(RecencyPrior(3), FourierPrior(1)).num_heads
        4
    """

    def __init__(self, *parts: LogPrior) -> None:
        checked = checked_parts("JoinedPrior", parts)
        super().__init__(checked, sum(part.num_heads for part in checked))
        counts = [part.num_heads for part in checked]
        self._starts = [sum(counts[:n]) for n in range(len(counts))]

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The log-prior of the part that has the head, in nats."""
        total: Tensor | None = None
        for start, part in zip(self._starts, self.parts, strict=True):
            value = part.log_prior((head - start).clamp(0, part.num_heads - 1), query_position, key_position)
            total = value if total is None else torch.where(head >= start, value, total)
        assert total is not None
        return total

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """The terms of all parts, each zero at the heads of the others."""
        return tuple(
            [
                term.weighted(self._among(start, part.num_heads))
                for start, part in zip(self._starts, self.parts, strict=True)
                for term in part.terms()
            ]
        )

    def read_tokens(self, tokens: Tokens) -> Reading:
        """What the parts read, each nothing at the heads of the others."""
        each = zip(self._starts, self.parts, read_each(self.parts, tokens), strict=True)
        readings = []
        for start, part, reading in each:
            among = self._among(start, part.num_heads)
            readings.append(reading.of_heads(part.num_heads).weighted(among).with_gains(among))
        return join_readings(readings)

    def _among(self, start: int, count: int) -> Callable[[Tensor], Tensor]:
        after = self.num_heads - start - count
        return lambda weights: functional.pad(weights, (0, 0, 0, 0, start, after))
