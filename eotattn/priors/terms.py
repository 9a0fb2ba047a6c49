"""Terms of a log-prior: fixed features of positions, and coefficients linear in what is learned.

Legend: H heads, L positions, K keys, F query features, G key features, C coordinates, N coefficients.

    log_prior[h, i, j] = query_features(i) . weights[h] . key_features(j)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import Any, ClassVar

import torch
from torch import Tensor

from eotattn.compat import constant_in_graphs
from eotattn.priors.memory import constants, name_in_graphs, remembered

__all__ = [
    "BIAS_TERM",
    "FEATURES",
    "PREPARED",
    "UNKNOWN_RANGE",
    "Entry",
    "Features",
    "KeyTerm",
    "Term",
    "computing_dtype",
    "dense_weights",
    "on_grid",
    "same_for_all_queries",
    "side_by_side",
]


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a prior computes for a kernel of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


#: (coefficient, query feature, key feature, sign).
Entry = tuple[int, int, int, float]


class Features:
    """The fixed side of a bilinear term: two pure functions of positions, and what is known of them.

    Args:
        name: Tells features apart: equal names, equal functions.
        query: (..., L) or (..., L, C) positions -> (..., L, F) float64.
        key: The same for keys, (..., L, G).
        entries: Which coefficient each weight is: (coefficient, query feature, key feature, sign); the rest is zero.
        num_features: F and G.
        is_relative: Whether positions may count from anywhere: the term sees differences of positions only.
        typical_range: Nats that the term commonly spans where it matters.
    """

    def __init__(
        self,
        name: str,
        query: Callable[[Tensor], Tensor],
        key: Callable[[Tensor], Tensor],
        *,
        entries: tuple[Entry, ...] = ((0, 0, 0, 1.0),),
        num_features: tuple[int, int] = (1, 1),
        is_relative: bool = False,
        typical_range: float = 8.0,
    ) -> None:
        self.name, self.query, self.key = name, query, key
        self.entries, self.num_features = entries, num_features
        self.is_relative, self.typical_range = is_relative, typical_range

    def like(
        self, name: str, query: Callable[[Tensor], Tensor], key: Callable[[Tensor], Tensor], **known: Any
    ) -> Features:
        """Other functions with the same weights."""
        same = {"entries": self.entries, "num_features": self.num_features, "typical_range": self.typical_range}
        return Features(name, query, key, **{**same, **known})

    @constant_in_graphs
    def prepare(self, make: str, *constants: Any) -> str:
        """Compute something from constants while a graph is traced; returns the attribute that holds it."""
        name = name_in_graphs(self, (make, *constants))
        if name not in vars(self):
            vars(self)[name] = PREPARED[make](*constants)
        return name


#: Nats that a term may span of which nothing is known: its factors take all pieces.
UNKNOWN_RANGE = 1e9
#: Features by name, so that a compiled graph can make a table of them by naming constants alone.
FEATURES: dict[str, Features] = {}
#: What :meth:`Features.prepare` can compute, by name.
PREPARED: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True, eq=False)
class Term:
    """One bilinear term of a log-prior.

    Args:
        features: Its fixed features.
        numbers: (H,) or (H, n) each, side by side N a head: what the weights are linear in.
        units: H constants that all numbers of a head are times; by default one.
    """

    features: Features
    numbers: tuple[Tensor, ...]
    units: tuple[float, ...] | None = None
    by_key_head: ClassVar[bool] = False

    @property
    def widths(self) -> tuple[int, ...]:
        """The n of each tensor of numbers."""
        return tuple([1 if one.dim() == 1 else one.shape[1] for one in self.numbers])

    @property
    def coefficients(self) -> Tensor:
        """(H, N, 1), nats."""
        return side_by_side(self.numbers, self.units).unsqueeze(-1)

    @property
    def weights(self) -> Tensor:
        """(H, F, G), nats."""
        return dense_weights(self.coefficients.squeeze(-1), self.features.entries, self.features.num_features)

    def sides(self, query_positions: Tensor, key_positions: Tensor) -> tuple[Tensor, Tensor]:
        """([B,] H, Q, G) query features times weights and ([B,] K, G) key features, at float64 positions."""
        if self.features.is_relative:  # smaller numbers, the same differences
            first = key_positions.flatten()[0]
            query_positions, key_positions = query_positions - first, key_positions - first
        query = self.features.query(query_positions).double().unsqueeze(-3)
        return query @ self.weights.double(), self.features.key(key_positions).double()

    def weighted(self, change: Callable[[Tensor], Tensor]) -> Term:
        """The same features with ``change`` applied to the coefficients."""
        return Term(self.features, (change(self.coefficients).squeeze(-1),))

    def scaled(self, factors: tuple[float, ...]) -> Term:
        """The same with H constants as factors."""
        return Term(
            self.features, self.numbers, factors if self.units is None else tuple(map(mul, self.units, factors))
        )

    def on_axis(self, axis: int) -> Term:
        """The term of one coordinate of a grid, zero where either position is a class token (negative)."""
        return replace(self, features=_on_axis(self.features, axis))


@dataclass(frozen=True, eq=False)
class KeyTerm:
    """A log-prior of keys that is looked up rather than multiplied out; queries see it times one fixed feature.

    Args:
        features: The query's one feature, (..., L, 1); keys have none.
        bias: Positions (..., K) or (..., K, C) -> (..., H, K), nats.
        by_key_head: Whether query heads that share a key head share the bias, (..., 1 or Hk, K); they share lanes then.
    """

    features: Features
    bias: Callable[[Tensor], Tensor]
    by_key_head: bool = False

    def scaled(self, factors: tuple[float, ...]) -> KeyTerm:
        """The same with H constants as factors."""
        return self.weighted(lambda numbers: constants(factors, numbers.device)[:, None, None] * numbers.double())

    def weighted(self, change: Callable[[Tensor], Tensor]) -> KeyTerm:
        """The same with ``change`` applied to the numbers, (..., H, K, 1)."""
        return replace(self, bias=lambda positions: change(self.bias(positions).unsqueeze(-1)).squeeze(-1))

    def on_axis(self, axis: int) -> KeyTerm:
        """The term of one coordinate of a grid, zero where either position is a class token (negative)."""

        def bias(positions: Tensor) -> Tensor:
            return self.bias(positions[..., axis].clamp(min=0)) * on_grid(positions).unsqueeze(-2)

        return KeyTerm(_on_axis(self.features, axis), bias)


def side_by_side(numbers: tuple[Tensor, ...], units: tuple[float, ...] | None) -> Tensor:
    """(H, N) of numbers (H,) or (H, n), in float64 where they have units."""
    each = [one if one.dim() == 2 else one.unsqueeze(-1) for one in numbers]
    beside = each[0] if len(each) == 1 else torch.cat(each, dim=-1)
    return beside if units is None else beside.double() * constants(units, beside.device).unsqueeze(-1)


def dense_weights(coefficients: Tensor, entries: tuple[Entry, ...], num_features: tuple[int, int]) -> Tensor:
    """(H, F, G) weights from (H, N) coefficients."""

    def basis() -> Tensor:
        full = torch.zeros(coefficients.shape[1], *num_features, dtype=coefficients.dtype, device=coefficients.device)
        for n, f, g, sign in entries:
            full[n, f, g] = sign
        return full.flatten(1)

    key = ("basis", entries, num_features, coefficients.dtype)
    return (coefficients @ remembered(key, coefficients.device, basis)).unflatten(-1, num_features)


def _gated(
    features: Features,
    label: str,
    gate: Callable[[Tensor], Tensor],
    at: Callable[[Tensor], Tensor],
    sides: Sequence[str],
    typical_range: float,
) -> Features:
    """Features that are zero where ``gate`` of a position is false, on the sides named, taken ``at`` the position."""
    name = f"{features.name}[{label}]"
    if name not in FEATURES:

        def gated(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def values(positions: Tensor) -> Tensor:
                return torch.where(gate(positions).unsqueeze(-1), function(at(positions)).to(torch.float64), 0.0)

            return values

        functions = {side: getattr(features, side) for side in ("query", "key")}
        functions |= {side: gated(functions[side]) for side in sides}
        FEATURES[name] = features.like(name, functions["query"], functions["key"], typical_range=typical_range)
    return FEATURES[name]


def _on_axis(features: Features, axis: int) -> Features:
    """Features of one coordinate, zero at class tokens."""
    at = lambda positions: positions[..., axis].clamp(min=0)  # noqa: E731
    return _gated(features, f"axis {axis}", on_grid, at, ("query", "key"), features.typical_range)


def on_grid(positions: Tensor) -> Tensor:
    """Which positions (..., C) are points of a grid; a class token has the coordinates -1 and no others."""
    return (positions > -1).all(-1)


def same_for_all_queries(num_coordinates: int, typical_range: float = 8.0) -> Features:
    """The query's one feature in a prior of keys that spans ``typical_range`` nats: one, whatever its position."""

    def one(positions: Tensor) -> Tensor:
        return torch.ones_like(positions).unsqueeze(-1) if num_coordinates == 1 else torch.ones_like(positions[..., :1])

    name = f"one ({num_coordinates} coordinates, {typical_range} nats)"
    if name not in FEATURES:
        FEATURES[name] = Features(name, one, one, typical_range=typical_range)
    return FEATURES[name]


for _count in range(1, 5):  # before any graph is traced
    same_for_all_queries(_count)
    same_for_all_queries(_count, UNKNOWN_RANGE)

#: Stands for a bias of keys that only a call brings, where lanes are counted.
BIAS_TERM = KeyTerm(same_for_all_queries(1, UNKNOWN_RANGE), lambda positions: torch.zeros_like(positions))
