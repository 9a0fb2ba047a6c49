"""What priors are made into: sums, multiples, choices of heads, and heads of several priors side by side.

Legend: H heads, F query features, G key features.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.checks import require
from eotattn.priors.base import LogPrior, ScoreMod, check_prior, computing_dtype
from eotattn.priors.bilinear import KeyTerm, Term
from eotattn.priors.tables import constants

__all__ = ["CombinedPrior", "HeadsPrior", "JoinedPrior", "ScaledPrior", "SumPrior"]


class CombinedPrior(LogPrior):
    """A prior made of others: it checks positions and resets as they do, and has lanes where they have them."""

    def __init__(self, parts: Sequence[LogPrior], num_heads: int) -> None:
        super().__init__(num_heads)
        self.num_coordinates = parts[0].num_coordinates
        self.parts = cast("Sequence[LogPrior]", nn.ModuleList(parts))

    @property
    def has_lanes(self) -> bool:
        """Whether every part has lanes."""
        return all(part.has_lanes for part in self.parts)

    def check_positions(self, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
        """Raise unless every part understands both positions."""
        for part in self.parts:
            part.check_positions(query_positions, key_positions)

    def reset_parameters(self) -> None:
        """Reset every part."""
        for part in self.parts:
            part.reset_parameters()


def _checked(owner: str, parts: Iterable[object]) -> list[LogPrior]:
    """Priors on positions of one kind."""
    checked = list(parts)
    require(len(checked) > 0, owner, "parts", "hold at least one prior", checked, "Pass the priors to combine")
    for part in checked:
        check_prior(owner, "parts", part)
    priors = cast("list[LogPrior]", checked)
    coordinates = [part.num_coordinates for part in priors]
    rule = "agree in num_coordinates"
    require(len(set(coordinates)) == 1, owner, "parts", rule, tuple(coordinates), "Rebuild one of them")
    return priors


class SumPrior(CombinedPrior):
    """The sum of log-priors, i.e. the product of priors. Written ``a + b``; nested sums are flattened.

    Args:
        parts: At least one prior; all with the same number of heads and coordinates.

    Attributes:
        parts: The summands, in order.

    Example:
        >>> from eotattn.priors import RecencyPrior, SinkPrior
        >>> len((RecencyPrior(2) + SinkPrior(2) + SinkPrior(2)).parts)
        3
    """

    def __init__(self, *parts: LogPrior) -> None:
        checked = _checked("SumPrior", parts)
        flat = [leaf for part in checked for leaf in (part.parts if isinstance(part, SumPrior) else [part])]
        heads = tuple(part.num_heads for part in flat)
        require(len(set(heads)) == 1, "SumPrior", "parts", "agree in num_heads", heads, "Rebuild one of them")
        super().__init__(flat, flat[0].num_heads)

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The sum of the parts, in nats."""
        return reduce(operator.add, [part.log_prior(head, query_position, key_position) for part in self.parts])

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """The terms of all parts."""
        return tuple([term for part in self.parts for term in part.terms()])

    def dense(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The sum of the dense parts, in float64 before it is rounded."""
        parts = [part.dense(query_positions, key_positions, dtype=torch.float64) for part in self.parts]
        return reduce(operator.add, parts).to(computing_dtype(dtype))

    def score_mod(self, query_positions: Tensor | None = None, key_positions: Tensor | None = None) -> ScoreMod:
        """The score modifications of the parts, one after the other."""
        each = [part.score_mod(query_positions, key_positions) for part in self.parts]

        def modified(score: Tensor, *index: Tensor) -> Tensor:
            for modify in each:
                score = modify(score, *index)
            return score

        return modified


class ScaledPrior(CombinedPrior):
    """A prior times a number, or one a head. Written ``0.5 * prior``.

    Heads whose factor is zero are without the prior: ``prior * (1.0, 1.0, 0.0)`` leaves the third head uniform. A key
    that the prior makes inadmissible (-inf) stays so, whatever the factor.

    Args:
        prior: The prior to scale; stays trainable.
        factor: Finite, dimensionless; or H of them.
        learnable: Whether the factors train too. Fixed ones are constants of the constructor, in no state dict.

    Attributes:
        factor: The factors: H floats, or an (H,) parameter.

    Example:
        >>> from eotattn.priors import RecencyPrior
        >>> (0.5 * RecencyPrior(8)).dense(torch.tensor([1]), torch.tensor([0]))[0].item()
        -0.25
    """

    factor: tuple[float, ...] | nn.Parameter

    def __init__(self, prior: LogPrior, factor: float | Sequence[float], *, learnable: bool = False) -> None:
        check_prior("ScaledPrior", "prior", prior)
        super().__init__([prior], prior.num_heads)
        numbers = [factor] * self.num_heads if isinstance(factor, (int, float)) else factor
        finite = all(isinstance(number, (int, float)) and abs(number) < float("inf") for number in numbers)
        good, rule = finite and len(numbers) == self.num_heads, f"be a finite number, or {self.num_heads} of them"
        require(good, "ScaledPrior", "factor", rule, factor, "Pass Python floats")
        self._start = tuple(float(number) for number in numbers)
        self.factor = nn.Parameter(torch.tensor(self._start, dtype=torch.float32)) if learnable else self._start

    @property
    def prior(self) -> LogPrior:
        """The prior that is scaled."""
        return self.parts[0]

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The scaled log-prior, in nats."""
        value = self.prior.log_prior(head, query_position, key_position)
        scaled = self._factors(value)[head] * value
        return torch.where(value == float("-inf"), value, scaled)  # times zero it would be NaN, times -1 a sole key

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """The terms of the prior with their weights scaled."""
        return tuple([term.weighted(self._scale) for term in self.prior.terms()])

    def reset_parameters(self) -> None:
        """Reset the prior, and learnable factors to those given at construction."""
        super().reset_parameters()
        if isinstance(self.factor, nn.Parameter):
            with torch.no_grad():
                self.factor.copy_(torch.tensor(self._start))

    def _factors(self, like: Tensor) -> Tensor:
        """(H,) in the dtype of ``like``."""
        factor = self.factor
        return factor.to(like.dtype) if isinstance(factor, Tensor) else constants(factor, like.device, like.dtype)

    def _scale(self, weights: Tensor) -> Tensor:
        weights = weights.double()
        return self._factors(weights)[:, None, None] * weights


class HeadsPrior(CombinedPrior):
    """Some heads of a prior, in any order, also several times: one log-prior for eight heads is ``[0] * 8`` of it.

    Args:
        prior: The prior to choose from; stays trainable.
        chosen: Head of ``prior`` for each head of this one, from 0 to its number of heads - 1.

    Example:
        >>> from eotattn.priors import FourierPrior
        >>> prior = HeadsPrior(FourierPrior(1, num_frequencies=4), [0] * 8)
        >>> prior.num_heads, sum(parameter.numel() for parameter in prior.parameters())
        (8, 8)
    """

    def __init__(self, prior: LogPrior, chosen: Sequence[int]) -> None:
        check_prior("HeadsPrior", "prior", prior)
        chosen = tuple(chosen)
        known = len(chosen) > 0 and all(type(head) is int and 0 <= head < prior.num_heads for head in chosen)
        rule = f"name heads from 0 to {prior.num_heads - 1}"
        require(known, "HeadsPrior", "chosen", rule, chosen, "Choose heads that the prior has")
        super().__init__([prior], len(chosen))
        self.chosen = chosen

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The log-prior of the chosen head, in nats."""
        index = constants(self.chosen, head.device, torch.int64)[head]
        return self.parts[0].log_prior(index, query_position, key_position)

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """The terms of the prior with the weights of the chosen heads."""
        return tuple([term.weighted(self._choose) for term in self.parts[0].terms()])

    def _choose(self, weights: Tensor) -> Tensor:
        return weights.index_select(-3, constants(self.chosen, weights.device, torch.int64))


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
        checked = _checked("JoinedPrior", parts)
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

    def _among(self, start: int, count: int) -> Callable[[Tensor], Tensor]:
        after = self.num_heads - start - count
        return lambda weights: functional.pad(weights, (0, 0, 0, 0, start, after))
