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
        decay: A smooth function of the distance: (N,) tokens, float64 -> (H, N) nats.
    """

    prior: Any = None
    constant: Tensor | None = None
    decay: Callable[[Tensor], Tensor] | None = None

    def __add__(self, other: Tail) -> Tail:
        one, more = self.decay, other.decay
        both = one if more is None else more if one is None else lambda distance: one(distance) + more(distance)
        return Tail(_sum(self.prior, other.prior), _sum(self.constant, other.constant), both)


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

    def changed(self, of_prior: Callable[[Any], Any], of_numbers: Callable[[Tensor], Tensor]) -> FarForm:
        """The same form with every prior changed, and all numbers, (H, N) nats."""

        def change(tail: Tail) -> Tail:
            prior, constant, decay = tail.prior, tail.constant, tail.decay
            return Tail(
                None if prior is None else of_prior(prior),
                None if constant is None else of_numbers(constant.unsqueeze(1)).squeeze(1),
                None if decay is None else lambda distance: of_numbers(decay(distance)),
            )

        return FarForm(self.reach, change(self.past), change(self.future))


def _sum(one: Any, other: Any) -> Any:
    return other if one is None else one if other is None else one + other
