"""The affinity of queries and keys in factored form: fused attention calls answer for it, in O((n + m) d) memory."""

# Legend: n queries, m keys, d content width; the leading dimensions (...) are a batch.

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from eotattn.priors.lanes import LaneFactors, computing_dtype
from eotattn.transport.arithmetic import product
from eotattn.transport.problems.affinity import Affinity, Exchange, Rows
from eotattn.transport.problems.fused import FusedCalls

__all__ = ["FactoredAffinity"]


@dataclass(frozen=True, eq=False)
class FactoredAffinity(Affinity):
    r"""``score_ij = <query_i, key_j> + query_bias_i + key_bias_j`` with a log-prior that is a sum of inner products.

    A question is one fused call on ``[query, prior lanes, 1]`` and ``[key, prior lanes, price]``, whose log-sum-exp is
    the soft maximum and whose output is the average. The dtype of query and key is the kernel's; in bfloat16 prices
    are written in three lanes, so that they keep 24 bits, and everything else stays in float32.

    Args:
        query: Shape (..., n, d), float32, float64 or bfloat16.
        key: Shape (..., m, d), the same dtype.
        query_bias: Cost units, shape (..., n), float64 for float64 and float32 otherwise, or ``None`` for zero.
        key_bias: The same for keys.
        factors: The log-prior, in nats.
        key_padding: Booleans, shape (..., m), true where no query may use the key; ``None`` for nowhere.
        query_padding: The same for queries; arises by exchanging the sides.
        direction: 1 where query i may use keys 0 to i (needs n = m), -1 where keys i to m, 0 without such an order.

    Example:
        >>> FactoredAffinity(torch.zeros(1, 4), torch.zeros(2, 4)).soft_maximum(torch.zeros(2), 1.0)
        tensor([0.6931])

    Source: original.
    """

    query: Tensor
    key: Tensor
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    factors: tuple[LaneFactors, ...] = ()
    key_padding: Tensor | None = None
    query_padding: Tensor | None = None
    direction: int = 0

    holds_pairs = False

    @cached_property
    def shape(self) -> torch.Size:
        """``(..., n, m)``."""
        leads = [self.query.shape[:-2], self.key.shape[:-2]]
        leads += [part.query.shape[:-2] for part in self.factors]
        vectors = (self.query_bias, self.key_bias, self.key_padding, self.query_padding)
        leads += [vector.shape[:-1] for vector in vectors if vector is not None]
        return torch.Size((*torch.broadcast_shapes(*leads), self.query.shape[-2], self.key.shape[-2]))

    @property
    def dtype(self) -> torch.dtype:
        """float64 for float64 factors, else float32."""
        return computing_dtype(self.query.dtype)

    @property
    def device(self) -> torch.device:
        """Of the factors."""
        return self.query.device

    @property
    def precision(self) -> str:
        """The kernel's dtype and that of the potentials."""
        kernel, own = (str(dtype).removeprefix("torch.") for dtype in (self.query.dtype, self.dtype))
        return f"{own}, fused" if kernel == own else f"{own}, fused in {kernel}"

    @property
    def resolution(self) -> float:
        """Of the kernel's dtype."""
        return torch.finfo(self.query.dtype).eps

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Query, key, biases, then query, key and row of each factor."""
        rest = [tensor for part in self.factors for tensor in (part.query, part.key, part.row)]
        return self.query, self.key, self.query_bias, self.key_bias, *rest

    def with_tensors(self, *tensors: Tensor | None) -> FactoredAffinity:
        """See ``Affinity``."""
        query, key, query_bias, key_bias, *rest = tensors
        assert query is not None
        assert key is not None
        triples = zip(self.factors, rest[::3], rest[1::3], rest[2::3], strict=True)
        factors = tuple(replace(part, query=left, key=right, row=row) for part, left, right, row in triples)  # type: ignore[arg-type]
        return replace(self, query=query, key=key, query_bias=query_bias, key_bias=key_bias, factors=factors)

    @cached_property
    def transposed(self) -> FactoredAffinity:
        """Queries and keys exchanged; the constants of rows become factors of their own."""
        sides = {"query": "key", "key": "query", "both": "both", None: None}
        swapped = [LaneFactors(part.key, part.query, None, sides[part.exact]) for part in self.factors]  # type: ignore[arg-type]
        rows = [part.row for part in self.factors if part.row is not None]
        swapped += [LaneFactors(row.new_ones(1, 1, 1), row[..., None], None, "query") for row in rows]
        return FactoredAffinity(
            self.key,
            self.query,
            self.key_bias,
            self.query_bias,
            tuple(swapped),
            self.query_padding,
            self.key_padding,
            -self.direction,
        )

    def soft_maximum(self, price: Tensor, epsilon: float) -> Tensor:
        """See ``Affinity``."""
        calls, constant = self._calls(epsilon), self._row_constant(epsilon)
        nats = calls.log_sum_exp(calls.bias(price))
        return epsilon * nats if constant is None else torch.add(constant, nats, alpha=epsilon)

    def exchange(self, epsilon: float, log_marginal: Tensor, growth: float) -> Exchange:
        """See ``Affinity``; here in nats throughout, and what is constant in a row cancels from what keys receive."""
        bare = replace(self, factors=tuple(replace(part, row=None) for part in self.factors))
        ask_queries, ask_keys = self._calls(epsilon), bare.transposed._calls(epsilon)
        constant = self._row_constant(epsilon) if growth else None
        if constant is not None:
            log_marginal = torch.add(log_marginal, constant, alpha=growth / epsilon)

        def both(key_potential: Tensor) -> tuple[Tensor, Tensor]:
            bias = ask_queries.bias(key_potential)
            nats = ask_queries.log_sum_exp(bias)
            log_rows = torch.add(log_marginal, nats, alpha=growth) if growth else log_marginal
            return log_rows, ask_keys.log_sum_exp(log_rows - nats) + bias

        return both

    def average(self, price: Tensor, value: Tensor, epsilon: float) -> Tensor:
        """See ``Affinity``."""
        found = self._calls(epsilon).average(price, value).to(self.dtype)
        return found if self.query_padding is None else found.masked_fill(self.query_padding[..., None], 0.0)

    def _calls(self, epsilon: float) -> FusedCalls:
        return FusedCalls.prepare(
            self.query,
            self.key,
            self.factors,
            epsilon=epsilon,
            key_bias=self.key_bias,
            key_padding=self.key_padding,
            direction=self.direction,
        )

    def _row_constant(self, epsilon: float) -> Tensor | None:
        """What no key changes of a query's soft maximum, cost units; -inf for a query without keys."""
        parts = [epsilon * part.row for part in self.factors if part.row is not None]
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
        parts += [part.row[..., index, None] for part in self.factors if part.row is not None]
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

    def reachable(self, alive: Tensor) -> Tensor:
        """See ``Affinity``."""
        alive = alive if self.query_padding is None else alive & ~self.query_padding
        if self.direction > 0:
            alive = alive.flip(-1).cumsum(-1).flip(-1) > 0
        elif self.direction < 0:
            alive = alive.cumsum(-1) > 0
        else:
            alive = alive.any(-1, keepdim=True)
        return alive if self.key_padding is None else alive & ~self.key_padding

    def log_prior_mass(self, kept: Tensor | None = None) -> Tensor:
        """See ``Affinity``."""
        price = torch.zeros(self.shape[-1], dtype=self.dtype, device=self.device)
        price = price if kept is None else torch.where(kept, price, -math.inf)
        alone = replace(self, query=self.query[..., :0], key=self.key[..., :0], query_bias=None, key_bias=None)
        return alone.soft_maximum(price, 1.0)

    @cached_property
    def largest(self) -> float:
        """By Cauchy and Schwarz."""
        parts = [side.detach().to(self.dtype).norm(dim=-1).max() for side in (self.query, self.key)]
        parts += [bias.detach().abs().max() for bias in (self.query_bias, self.key_bias) if bias is not None]
        query, key, *biases = torch.stack(parts).tolist()
        return float(query * key + sum(biases))

    @property
    def spread(self) -> float:
        """Twice the bound of a single score."""
        return 2 * self.largest
