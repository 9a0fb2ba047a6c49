"""What a log-prior is far away: beyond some tokens a constant, or a prior with lanes, on either side.

Legend: H heads.

Near keys can then be attended by blocks with the log-prior in full, and far keys by stock fused calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["FarForm", "Tail"]


@dataclass(frozen=True)
class Tail:
    """A log-prior far away on one side: the sum of both parts that there are.

    Args:
        prior: A :class:`~eotattn.priors.LogPrior` with lanes.
        constant: (H,) nats, with gradients to learned numbers.
    """

    prior: Any = None
    constant: Tensor | None = None

    def __add__(self, other: Tail) -> Tail:
        prior, constant = self.prior, self.constant
        if other.prior is not None:
            prior = other.prior if prior is None else prior + other.prior
        if other.constant is not None:
            constant = other.constant if constant is None else constant + other.constant
        return Tail(prior, constant)


@dataclass(frozen=True)
class FarForm:
    """A log-prior of keys ``reach`` or more tokens away.

    Args:
        reach: Tokens; lags of smaller size are near. Zero where nothing is: ``past`` then holds for the query's own
            position and before, ``future`` after it.
        past: The log-prior of keys before the query.
        future: The log-prior of keys after it.
    """

    reach: int
    past: Tail
    future: Tail

    def __add__(self, other: FarForm) -> FarForm:
        return FarForm(max(self.reach, other.reach), self.past + other.past, self.future + other.future)

    def changed(self, of_prior: Callable[[Any], Any], of_constant: Callable[[Tensor], Tensor]) -> FarForm:
        """The same form with every prior and every constant changed."""

        def change(tail: Tail) -> Tail:
            prior, constant = tail.prior, tail.constant
            return Tail(None if prior is None else of_prior(prior), None if constant is None else of_constant(constant))

        return FarForm(self.reach, change(self.past), change(self.future))
