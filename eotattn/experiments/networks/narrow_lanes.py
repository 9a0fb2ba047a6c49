"""A prior as naive lanes carry it: every factor one bfloat16 number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from eotattn.checks import require
from eotattn.priors import LogPrior
from eotattn.priors.base import CombinedPrior
from eotattn.priors.terms import FEATURES, Features, Term

__all__ = ["NarrowLanesPrior"]


class NarrowLanesPrior(CombinedPrior):
    """bfloat16(query features) . bfloat16(weights) . bfloat16(key features) of another prior.

    This is what becomes of a prior whose lanes are written in bfloat16 as they are, instead of being split: beyond
    position 256 positions are multiples of two, beyond 512 of four. It is so in every dtype and on every device, so
    that training and evaluation can be compared with those of the exact prior. Weights have the gradients that they
    have unrounded.

    Args:
        prior: A bilinear prior; stays trainable.

    Example:
        >>> from eotattn.priors import RecencyPrior
        >>> prior, at = RecencyPrior(2).freeze(), torch.tensor([1001, 1003])
        >>> [float(form.dense(at, at)[0, 1].diff()) for form in (prior, NarrowLanesPrior(prior))]
        [0.125, 0.25]
    """

    def __init__(self, prior: LogPrior) -> None:
        is_bilinear = prior.has_lanes and all(isinstance(term, Term) for term in prior.terms())
        remedy = "Pass one without tables"
        require(is_bilinear, "NarrowLanesPrior", "prior", "be bilinear", type(prior).__name__, remedy)
        super().__init__([prior], prior.num_heads)

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The sum of the rounded terms, elementwise, in nats."""
        total = torch.zeros_like(query_position)
        for term in self.terms():
            weights = term.weights[head].to(query_position.dtype)
            query, key = term.features.query(query_position), term.features.key(key_position)
            factors = (query.to(weights.dtype).unsqueeze(-2) @ weights).squeeze(-2)
            total = total + (factors * key.to(weights.dtype)).sum(-1)
        return total

    def terms(self) -> tuple[Term, ...]:
        """The terms of the other prior with features and weights rounded."""
        terms = [term.weighted(_rounded) for term in self.parts[0].terms() if isinstance(term, Term)]
        return tuple([replace(term, features=_narrow(term.features)) for term in terms])


def _rounded(values: Tensor) -> Tensor:
    """The nearest bfloat16 numbers, with the gradient of what they are rounded from."""
    return values + (values.bfloat16().to(values.dtype) - values).detach()


def _narrow(features: Features) -> Features:
    """The same features rounded; positions then count from zero, since differences are no longer what they were."""
    name = f"{features.name} in bfloat16"
    if name not in FEATURES:

        def rounded(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda positions: _rounded(function(positions).double())

        sides = rounded(features.query), rounded(features.key)
        FEATURES[name] = features.like(name, *sides)
    return FEATURES[name]
