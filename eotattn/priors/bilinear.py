"""Bilinear log-priors: fixed features of positions, and weights linear in what is learned.

Legend: H heads, L positions, Q queries, K keys, F query features, G key features, C coordinates.

    log_prior[h, i, j] = query_features(i) . weights[h] . key_features(j)

That sentence is the whole contract of a prior that fused kernels can carry. Dense form, lanes of every dtype,
gradients and the FlexAttention form follow from it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Number
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from eotattn.checks import fail
from eotattn.priors.base import LogPrior, ScoreMod, computing_dtype
from eotattn.priors.positions import table_lookup
from eotattn.priors.tables import remembered

__all__ = [
    "FEATURES",
    "PREPARED",
    "UNKNOWN_RANGE",
    "BilinearPrior",
    "Features",
    "KeyTerm",
    "Term",
    "on_grid",
    "same_for_all_queries",
]


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

    @torch.compiler.assume_constant_result
    def prepare(self, make: str, *constants: Any) -> str:
        """Compute something from constants while a graph is traced; returns the attribute that holds it."""
        name = f"{make}_{abs(hash(constants))}"
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
        coefficients: (H, N, 1), nats: what the weights are made of, linear in learned numbers.
    """

    features: Features
    coefficients: Tensor

    @property
    def weights(self) -> Tensor:
        """(H, F, G), nats."""
        return dense_weights(self.coefficients.squeeze(-1), self.features.entries, self.features.num_features)

    def weighted(self, change: Callable[[Tensor], Tensor]) -> Term:
        """The same features with ``change`` applied to the coefficients."""
        return replace(self, coefficients=change(self.coefficients))

    def on_axis(self, axis: int) -> Term:
        """The term of one coordinate of a grid, zero where either position is a class token (negative)."""
        return replace(self, features=_on_axis(self.features, axis))

    def of_tokens(self) -> Term:
        """The term without keys before the first token. What was a constant of each row counts then, in full."""
        gate, at = (lambda positions: positions >= 0), (lambda positions: positions.clamp(min=0))
        return replace(self, features=_gated(self.features, "tokens", gate, at, ("key",), UNKNOWN_RANGE))


@dataclass(frozen=True, eq=False)
class KeyTerm:
    """A log-prior of keys that is looked up rather than multiplied out; queries see it times one fixed feature.

    Args:
        features: The query's one feature, (..., L, 1); keys have none.
        bias: Positions (..., K) or (..., K, C) -> (..., H, K), nats.
    """

    features: Features
    bias: Callable[[Tensor], Tensor]

    def weighted(self, change: Callable[[Tensor], Tensor]) -> KeyTerm:
        """The same with ``change`` applied to the numbers, (..., H, K, 1)."""
        return replace(self, bias=lambda positions: change(self.bias(positions).unsqueeze(-1)).squeeze(-1))

    def on_axis(self, axis: int) -> KeyTerm:
        """The term of one coordinate of a grid, zero where either position is a class token (negative)."""

        def bias(positions: Tensor) -> Tensor:
            return self.bias(positions[..., axis].clamp(min=0)) * on_grid(positions).unsqueeze(-2)

        return KeyTerm(_on_axis(self.features, axis), bias)

    def of_tokens(self) -> KeyTerm:
        """The term without keys before the first token."""
        return replace(self, bias=lambda at: self.bias(at.clamp(min=0)) * (at >= 0).unsqueeze(-2))


class _NamesFeatures(type):
    """Names the features of a prior when its constructor has set all constants."""

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        prior = super().__call__(*arguments, **keywords)
        prior._name_features()
        return prior


class BilinearPrior(LogPrior, metaclass=_NamesFeatures):
    """A log-prior query_features(i) . weights[h] . key_features(j), which any fused kernel carries in lanes.

    A subclass writes :meth:`query_features`, :meth:`key_features`, :meth:`weights` and :meth:`reset_parameters`.
    Features are fixed: they may read constants that the constructor set (numbers, strings, tuples of them) but no
    parameter, and are computed once for equal constants. Weights are linear in the learned numbers. Where most of them
    are zero or occur twice, :meth:`coefficients` and :meth:`entries` say the same in fewer numbers.

    Args:
        num_heads: Number of query heads H.

    Example:
        >>> class FirstToken(BilinearPrior):
        ...     def __init__(self, num_heads: int) -> None:
        ...         super().__init__(num_heads)
        ...         self.height = nn.Parameter(torch.ones(num_heads))
        ...     def query_features(self, positions: Tensor) -> Tensor:
        ...         return torch.ones_like(positions).unsqueeze(-1)
        ...     def key_features(self, positions: Tensor) -> Tensor:
        ...         return (positions == 0).unsqueeze(-1)
        ...     def weights(self) -> Tensor:
        ...         return self.height[:, None, None]
        >>> FirstToken(2).dense(torch.arange(2), torch.arange(3))[0].tolist()
        [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """

    _features_name: str
    #: Whether the log-prior depends on differences of positions only.
    is_relative: bool = False
    #: Nats that the log-prior commonly spans where it matters: what a tolerance is compared with.
    typical_range: float = 8.0

    @abstractmethod
    def query_features(self, positions: Tensor) -> Tensor:
        """Features of queries at positions (..., L), float64, on grids (..., L, C): (..., L, F)."""
        raise NotImplementedError

    @abstractmethod
    def key_features(self, positions: Tensor) -> Tensor:
        """Features of keys at positions (..., L), float64, on grids (..., L, C): (..., L, G)."""
        raise NotImplementedError

    def weights(self) -> Tensor:
        """(H, F, G), nats, with gradients to the learned numbers."""
        features = FEATURES[self._features_name]
        return dense_weights(self.coefficients(), features.entries, features.num_features)

    def coefficients(self) -> Tensor:
        """(H, N), nats: the numbers that weights are made of; by default the weights themselves."""
        return self.weights().flatten(1)

    def entries(self) -> tuple[Entry, ...] | None:
        """Which coefficient each weight is, by constants alone; ``None`` if coefficients are the weights themselves."""
        return None

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """One term."""
        return (Term(FEATURES[self._features_name], self.coefficients().unsqueeze(-1)),)

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The bilinear form, elementwise, in nats."""
        query, key = self.query_features(query_position), self.key_features(key_position)
        weights = self.weights()[head].to(query_position.dtype)
        factors = (query.to(weights.dtype).unsqueeze(-2) @ weights).squeeze(-2)
        return (factors * key.to(weights.dtype)).sum(-1)

    def dense(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """As in :class:`LogPrior`; one product of matrices."""
        self.check_positions(query_positions, key_positions)
        factors, features = self._sides(query_positions, key_positions)
        return (factors @ _with_heads(features).mT).to(computing_dtype(dtype))

    def score_mod(self, query_positions: Tensor | None = None, key_positions: Tensor | None = None) -> ScoreMod:
        """As in :class:`LogPrior`; with positions given, features are looked up, exact at any length."""
        if query_positions is None or key_positions is None:
            return super().score_mod(query_positions, key_positions)
        self.check_positions(query_positions, key_positions)
        factors, features = self._sides(query_positions, key_positions)
        query_at = table_lookup(factors.movedim(-3, -2).float(), has_batch=factors.dim() == 4)
        key_at = table_lookup(features.float(), has_batch=features.dim() == 3)

        def modified(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
            for g in range(factors.shape[-1]):
                score = score + query_at(batch, query_index, head, g) * key_at(batch, key_index, g)
            return score

        return modified

    def _sides(self, query_positions: Tensor, key_positions: Tensor) -> tuple[Tensor, Tensor]:
        """([B,] H, Q, G) query features times weights, and ([B,] K, G) key features, float64."""
        query, key = (positions.double() for positions in (query_positions, key_positions))
        if self.is_relative:  # smaller numbers, the same differences
            first = key.flatten()[0]
            query, key = query - first, key - first
        features = FEATURES[self._features_name]
        factors = _with_heads(features.query(query).double()) @ self.weights().double()
        return factors, features.key(key).double()

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the features of a prior in step with its constants, also with those set after construction."""
        super().__setattr__(name, value)
        if "_features_name" in self.__dict__ and name in self.__dict__ and name not in _OF_MODULES:
            self._name_features()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._name_features()

    def __getattr__(self, name: str) -> Any:
        """Also say, where features read what they may not, what that is."""
        hidden = vars(self).get("_hidden", {})
        if name in hidden:
            rule = "read nothing but numbers, strings and tuples of them that the constructor set"
            remedy = "Let weights() read what is learned"
            fail(type(self).__name__, "features", rule, f"{name}, a {hidden[name]}", remedy, error=TypeError)
        return super().__getattr__(name)

    def _name_features(self) -> None:
        values = {name: value for name, value in vars(self).items() if name not in _OF_MODULES}
        told = {name: text for name, value in values.items() if (text := _tell(value))}
        others = {name: value for name, value in values.items() if name not in told}
        others.update(self._parameters, **self._buffers, **self._modules)
        hidden = {name: type(value).__name__ for name, value in others.items()}
        cls = type(self)
        name = f"{cls.__qualname__}@{id(cls)}({', '.join(f'{key}={text}' for key, text in told.items())}) not {hidden}"
        if name not in FEATURES:
            fixed = cls.__new__(cls)  # without what may change: features that read it fail instead of becoming stale
            vars(fixed).update(vars(nn.Module()), **{key: values[key] for key in told}, _hidden=hidden)
            at = torch.zeros((1,) if self.num_coordinates == 1 else (1, self.num_coordinates), dtype=torch.float64)
            num_query, num_key = fixed.query_features(at).shape[-1], fixed.key_features(at).shape[-1]
            everything = tuple((f * num_key + g, f, g, 1.0) for f in range(num_query) for g in range(num_key))
            FEATURES[name] = Features(
                name,
                fixed.query_features,
                fixed.key_features,
                entries=fixed.entries() or everything,
                num_features=(num_query, num_key),
                is_relative=self.is_relative,
                typical_range=self.typical_range,
            )
        vars(self)["_features_name"] = name


#: What every module holds, and what has no part in features.
_OF_MODULES = {*vars(nn.Module()), "_features_name"}


def _tell(value: object) -> str:
    """A constant in full, so that equal texts are equal constants; nothing for what may change unseen."""
    if isinstance(value, (Number, str, bytes, type(None), torch.dtype)):
        return repr(value)
    if isinstance(value, FunctionType):
        return f"{value.__qualname__}@{id(value)}"
    if isinstance(value, tuple):
        told = [_tell(entry) for entry in value]
        return f"({', '.join(told)},)" if all(told) else ""
    return ""


def dense_weights(coefficients: Tensor, entries: tuple[Entry, ...], num_features: tuple[int, int]) -> Tensor:
    """(H, F, G) weights from (H, N) coefficients."""

    def basis() -> Tensor:
        full = torch.zeros(coefficients.shape[1], *num_features, dtype=coefficients.dtype, device=coefficients.device)
        for n, f, g, sign in entries:
            full[n, f, g] = sign
        return full.flatten(1)

    key = ("basis", entries, num_features, coefficients.dtype)
    return (coefficients @ remembered(key, coefficients.device, basis)).unflatten(-1, num_features)


def _with_heads(features: Tensor) -> Tensor:
    """(L, F) or (B, L, F) as (1, L, F) or (B, 1, L, F)."""
    return features.unsqueeze(-3)


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
