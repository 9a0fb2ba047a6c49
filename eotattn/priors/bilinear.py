"""Bilinear log-priors: fixed features of positions, and weights linear in what is learned.

Legend: H heads, L positions, Q queries, K keys, F query features, G key features, C coordinates.

    log_prior[h, i, j] = query_features(i) . weights[h] . key_features(j)

That sentence is the whole contract of a prior that fused kernels can carry. Dense form, lanes of every dtype,
gradients and the FlexAttention form follow from it.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from numbers import Number
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from eotattn.checks import fail
from eotattn.priors.base import LogPrior
from eotattn.priors.terms import FEATURES, Entry, Features, KeyTerm, Term, computing_dtype, dense_weights, side_by_side

__all__ = ["BilinearPrior"]


class _NamesFeatures(type):
    """Names the features of a prior when its constructor has set all constants."""

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        prior = super().__call__(*arguments, **keywords)
        prior._name_features()
        return prior

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of the constructor, for :func:`help` and the API reference."""
        own = inspect.signature(cls.__init__)  # type: ignore[misc]  # of this class, whatever its subclasses do
        return own.replace(parameters=list(own.parameters.values())[1:])


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
    #: Nats that the log-prior commonly spans where it matters: what a tolerance is compared with.
    typical_range: float = 8.0

    def __init_subclass__(cls) -> None:
        """Refuse two statements of the weights: lanes are made of coefficients where a class or a parent has them."""
        super().__init_subclass__()
        stated = (cls.coefficients, cls.learned) != (BilinearPrior.coefficients, BilinearPrior.learned)
        if "weights" in vars(cls) and stated:
            rule, remedy = "follow from coefficients() and entries()", "State those instead"
            fail(cls.__name__, "weights", rule, "another statement of them", remedy, error=TypeError)

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
        return side_by_side(self.learned(), self.units())

    def learned(self) -> tuple[Tensor, ...]:
        """Tensors (H,) or (H, n), side by side N numbers a head: coefficients, or multiples of them by constants.

        A prior that says so rather than in :meth:`coefficients` takes fewer operations a call.
        """
        return (self.weights().flatten(1),)

    def units(self) -> tuple[float, ...] | None:
        """H constants that coefficients are the learned numbers times, nats; ``None`` for one."""
        return None

    def entries(self) -> tuple[Entry, ...] | None:
        """Which coefficient each weight is, by constants alone; ``None`` if coefficients are the weights themselves."""
        return None

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """One term."""
        features = FEATURES[self._features_name]
        if type(self).coefficients is not BilinearPrior.coefficients:
            return (Term(features, (self.coefficients(),)),)
        return (Term(features, self.learned(), self.units()),)

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The bilinear form, elementwise, in nats."""
        query, key = self.query_features(query_position), self.key_features(key_position)
        weights = self.weights()[head].to(query_position.dtype)
        factors = (query.to(weights.dtype).unsqueeze(-2) @ weights).squeeze(-2)
        return (factors * key.to(weights.dtype)).sum(-1)

    def dense(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """As in :class:`LogPrior`; one product of matrices."""
        self.check_positions(query_positions, key_positions)
        (term,) = BilinearPrior.terms(self)
        assert isinstance(term, Term)
        factors, features = term.sides(query_positions.double(), key_positions.double())
        return (factors @ features.unsqueeze(-3).mT).to(computing_dtype(dtype))

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
        parameters = vars(self).get("_parameters", {})
        if name in parameters:  # at once: every call asks
            return parameters[name]
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
        for learned in (self.named_parameters, self.named_buffers):
            others.update(learned(recurse=False))
        others.update(self.named_children())
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
