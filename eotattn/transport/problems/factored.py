"""The affinity of queries and keys in factored form: fused attention calls answer for it, in O((n + m) d) memory."""

# Legend: n queries, m keys, d content width; the leading dimensions (...) are a batch.

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from eotattn.priors.terms import computing_dtype
from eotattn.transport.arithmetic import product
from eotattn.transport.problems.affinity import Affinity, Exchange, Number, Rows, plus, sent
from eotattn.transport.problems.fused import FusedCalls
from eotattn.transport.problems.prior_factors import PriorFactors

__all__ = ["FactoredAffinity", "PointAffinity"]


@dataclass(frozen=True, eq=False)
class FactoredAffinity(Affinity):
    """``score_ij = <query_i, key_j> + query_bias_i + key_bias_j`` with a log-prior that is a sum of inner products.

    A question is one fused call on ``[query, prior lanes, 1]`` and ``[key, prior lanes, potential]``, whose
    log-sum-exp is the soft c-transform and whose output is the average. The dtype of query and key is the kernel's; in
    bfloat16 potentials are written in three lanes, so that they keep 24 bits, and everything else stays in float32.
    """

    query: Tensor  # (..., n, d), float32, float64 or bfloat16
    key: Tensor  # (..., m, d)
    query_bias: Tensor | None = None  # cost units, (..., n), float32 or float64
    key_bias: Tensor | None = None  # the same for keys
    factors: tuple[PriorFactors, ...] = ()  # of the log-prior that depends on both sides, nats
    query_log_prior: Tensor | None = None  # the part of the query alone, nats, (..., n)
    key_log_prior: Tensor | None = None  # the same for keys
    key_padding: Tensor | None = None  # true where no query may use the key, (..., m)
    query_padding: Tensor | None = None  # the same for queries; arises by exchanging the sides
    direction: int = 0  # 1 where query i may use keys 0 to i (n = m), -1 where keys i to m, else 0

    holds_pairs = False

    @cached_property
    def shape(self) -> torch.Size:
        """``(..., n, m)``."""
        leads = [self.query.shape[:-2], self.key.shape[:-2]]
        leads += [part.query.shape[:-2] for part in self.factors]
        vectors = (self.query_bias, self.key_bias, self.query_log_prior, self.key_log_prior)
        paddings = (self.key_padding, self.query_padding)
        leads += [vector.shape[:-1] for vector in (*vectors, *paddings) if vector is not None]
        return torch.Size((*torch.broadcast_shapes(*leads), self.query.shape[-2], self.key.shape[-2]))

    dtype = property(lambda self: computing_dtype(self.query.dtype))
    device = property(lambda self: self.query.device)
    resolution = property(lambda self: torch.finfo(self.query.dtype).eps)
    spread = property(lambda self: 2 * self.largest)

    @property
    def precision(self) -> str:
        """The kernel's dtype and that of the potentials."""
        kernel, own = (str(dtype).removeprefix("torch.") for dtype in (self.query.dtype, self.dtype))
        return f"{own}, fused" if kernel == own else f"{own}, fused in {kernel}"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Query, key, biases and the parts of the log-prior of one side, then query and key of each factor."""
        sides = (self.query_bias, self.key_bias, self.query_log_prior, self.key_log_prior)
        return self.query, self.key, *sides, *(side for part in self.factors for side in (part.query, part.key))

    def with_tensors(self, *tensors: Tensor | None) -> FactoredAffinity:
        """See ``Affinity``."""
        names = ("query", "key", "query_bias", "key_bias", "query_log_prior", "key_log_prior")
        rest = tensors[len(names) :]
        pairs = zip(self.factors, rest[::2], rest[1::2], strict=True)
        factors = tuple(replace(part, query=query, key=key) for part, query, key in pairs)  # type: ignore[arg-type]
        return replace(self, **dict(zip(names, tensors, strict=False)), factors=factors)  # type: ignore[arg-type]

    @cached_property
    def transposed(self) -> FactoredAffinity:
        """Queries and keys exchanged."""
        sides = {"query": "key", "key": "query", None: None}
        swapped = tuple(PriorFactors(part.key, part.query, None, sides[part.exact]) for part in self.factors)  # type: ignore[arg-type]
        return FactoredAffinity(
            self.key,
            self.query,
            self.key_bias,
            self.query_bias,
            swapped,
            self.key_log_prior,
            self.query_log_prior,
            self.query_padding,
            self.key_padding,
            -self.direction,
        )

    def with_queries(self, query: Tensor) -> FactoredAffinity:
        """See ``Affinity``; content without a place, so not under a prior of positions or an order."""
        return replace(self._without_places(), query=query, query_log_prior=None, query_padding=None)

    def with_keys(self, key: Tensor) -> FactoredAffinity:
        """See ``Affinity``; likewise."""
        return replace(self._without_places(), key=key, key_log_prior=None, key_padding=None)

    def _without_places(self) -> FactoredAffinity:
        """Itself, or an error where positions matter."""
        if self.factors or self.direction:
            raise NotImplementedError(
                "TransportSolution: potentials at new content need a problem without prior and order; got one with "
                "positions. State a problem with the new content instead."
            )
        return self

    def soft_c_transform(self, potential: Tensor, epsilon: Number) -> Tensor:
        """See ``Affinity``."""
        calls, constant = self._calls(epsilon), self._row_constant(epsilon)
        nats = calls.log_sum_exp(calls.bias(potential))
        return -epsilon * nats if constant is None else -plus(constant, nats, epsilon)

    def exchange(self, epsilon: Number, log_marginal: Tensor, growth: Number) -> Exchange:
        """See ``Affinity``; here in nats throughout, and what is constant in a row cancels from what keys receive."""
        ask_queries = self._calls(epsilon)
        ask_keys = replace(self, query_log_prior=None, query_bias=None).transposed._calls(epsilon)
        constant = self._row_constant(epsilon)
        constant = None if constant is None else constant / epsilon

        def both(key_potential: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            bias = ask_queries.bias(key_potential)
            nats = ask_queries.log_sum_exp(bias)
            normaliser = nats if constant is None else nats + constant
            log_rows = sent(log_marginal, normaliser, growth)
            return log_rows, ask_keys.log_sum_exp(log_rows - nats) + bias, normaliser

        return both

    def average(self, potential: Tensor, value: Tensor, epsilon: Number) -> Tensor:
        """See ``Affinity``."""
        found = self._calls(epsilon).average(potential, value).to(self.dtype)
        return found if self.query_padding is None else found.masked_fill(self.query_padding[..., None], 0.0)

    def _calls(self, epsilon: Number) -> FusedCalls:
        return FusedCalls.prepare(
            self.query,
            self.key,
            self.factors,
            epsilon=epsilon,
            key_bias=self.key_bias,
            key_log_prior=self.key_log_prior,
            key_padding=self.key_padding,
            direction=self.direction,
        )

    def _row_constant(self, epsilon: Number) -> Tensor | None:
        """What no key changes of a query's normaliser, cost units; -inf for a query without keys."""
        parts = [] if self.query_log_prior is None else [epsilon * self.query_log_prior]
        parts += [] if self.query_bias is None else [self.query_bias]
        if self.query_padding is not None:
            zero = torch.zeros(self.query_padding.shape, dtype=self.dtype, device=self.device)
            parts.append(zero.masked_fill(self.query_padding, -math.inf))
        return sum(parts[1:], start=parts[0]) if parts else None

    def rows(self, index: Rows) -> tuple[Tensor, Tensor | None]:
        """See ``Affinity``."""
        dtype = self.dtype
        score = product(self.query[..., index, :].to(dtype), self.key.to(dtype).mT)
        if self.query_bias is not None:
            score = score + self.query_bias[..., index, None]
        if self.key_bias is not None:
            score = score + self.key_bias[..., None, :]
        parts = [product(part.query[..., index, :].to(dtype), part.key.to(dtype).mT) for part in self.factors]
        parts += [] if self.query_log_prior is None else [self.query_log_prior[..., index, None]]
        parts += [] if self.key_log_prior is None else [self.key_log_prior[..., None, :].expand(score.shape)]
        forbidden = self._forbidden(index)
        if forbidden is not None:
            parts.append(score.new_zeros(()).expand(forbidden.shape).masked_fill(forbidden, -math.inf))
        return score, sum(parts[1:], start=parts[0]) if parts else None

    def _forbidden(self, index: Rows) -> Tensor | None:
        """Which pairs of some rows are inadmissible, or ``None``."""
        found = None
        if self.direction:
            query = torch.arange(self.query.shape[-2], device=self.device)[index, None]
            key = torch.arange(self.key.shape[-2], device=self.device)
            found = key > query if self.direction > 0 else key < query
        if self.key_padding is not None:
            found = self.key_padding[..., None, :] if found is None else found | self.key_padding[..., None, :]
        if self.query_padding is not None:
            padded = self.query_padding[..., index, None]
            found = padded if found is None else found | padded
        return found

    @property
    def forbids(self) -> bool:
        """See ``Affinity``."""
        return bool(self.direction) or self.key_padding is not None or self.query_padding is not None

    def highest(self, potential: Tensor) -> Tensor:
        """See ``Affinity``."""
        if self.key_padding is not None:
            potential = torch.where(self.key_padding, -math.inf, potential)
        if self.direction > 0:
            potential = potential.cummax(-1).values
        elif self.direction < 0:
            potential = potential.flip(-1).cummax(-1).values.flip(-1)
        else:
            potential = potential.amax(-1, keepdim=True)
        return potential if self.query_padding is None else torch.where(self.query_padding, -math.inf, potential)

    def log_prior_mass(self, kept: Tensor | None = None) -> Tensor:
        """See ``Affinity``."""
        potential = torch.zeros(self.shape[-1], dtype=self.dtype, device=self.device)
        potential = potential if kept is None else torch.where(kept, potential, -math.inf)
        alone = replace(self, query=self.query[..., :0], key=self.key[..., :0], query_bias=None, key_bias=None)
        return -alone.soft_c_transform(potential, 1.0)

    @cached_property
    def largest(self) -> float:
        """By Cauchy and Schwarz."""
        parts = [side.detach().to(self.dtype).norm(dim=-1).max() for side in (self.query, self.key)]
        parts += [bias.detach().abs().max() for bias in (self.query_bias, self.key_bias) if bias is not None]
        query, key, *biases = torch.stack(parts).tolist()
        return float(query * key + sum(biases))

    @cached_property
    def product_size(self) -> float:
        """Of inner products and biases, from mean squares."""
        parts = [side.detach().to(self.dtype).square().sum(-1).mean().sqrt() for side in (self.query, self.key)]
        parts += [bias.detach().abs().mean() for bias in (self.query_bias, self.key_bias) if bias is not None]
        query, key, *biases = torch.stack(parts).tolist()
        return float(query * key + sum(biases))


@dataclass(frozen=True, eq=False)
class PointAffinity(FactoredAffinity):
    """Minus the squared distance of points: ``2 <query_i, key_j> - |query_i|^2 - |key_j|^2``.

    Distances do not see a common shift, but their expansion does: far from the origin it is a difference of large
    numbers. So the points are centred first, all problems of a batch alike; bfloat16 points, which that would round,
    are taken as they are.
    """

    centre: Tensor | None = None  # what was subtracted from the points, (d,)

    @classmethod
    def between(cls, query: Tensor, key: Tensor, **rest: Tensor | None) -> PointAffinity:
        """The affinity of points (..., n, d) and (..., m, d)."""
        centre = None
        if query.dtype == computing_dtype(query.dtype):
            centre = sum(side.detach().flatten(0, -2).mean(0) for side in (query, key)) / 2
            query, key = query - centre, key - centre
        return cls(2 * query, key, cls._bias(query), cls._bias(key), centre=centre, **rest)  # type: ignore[arg-type]

    def with_queries(self, query: Tensor) -> PointAffinity:
        """See ``Affinity``."""
        query = self._centred(query)
        return replace(super().with_queries(2 * query), query_bias=self._bias(query))  # type: ignore[return-value]

    def with_keys(self, key: Tensor) -> PointAffinity:
        """See ``Affinity``."""
        key = self._centred(key)
        return replace(super().with_keys(key), key_bias=self._bias(key))  # type: ignore[return-value]

    def _centred(self, points: Tensor) -> Tensor:
        return points if self.centre is None else points - self.centre

    @staticmethod
    def _bias(points: Tensor) -> Tensor:
        return -points.to(computing_dtype(points.dtype)).square().sum(-1)
