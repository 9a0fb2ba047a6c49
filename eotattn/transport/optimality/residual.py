"""The problem as seen from the keys: their mass, their target and the marginal residual between them."""

# Legend: n queries, m keys; the leading dimensions are a batch. The queries always give their best answer.

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from eotattn.transport.optimality.response import penalty_share
from eotattn.transport.problems import TransportProblem
from eotattn.transport.problems.affinity import Number, is_constraint, plus
from eotattn.transport.problems.scaling import Scaling

__all__ = ["MarginalResidual", "Residuals", "marginal_residual", "starting_potential", "stiffness"]

#: Machine epsilons of a logit within which totals count as equal; nats that the last digit of a potential may be worth.
_ROUNDINGS = 4
_COARSEST = 0.1
#: Roundings of every number that a marginal error is made of, and of constants: logarithms, exponentials, products.
_FLOOR = 2
_CONSTANT = 8


@dataclass(frozen=True, eq=False)
class MarginalResidual:
    """What ``Residuals`` return: masses relative to ``exp(log_scale)``, logs in nats, -inf on what carries nothing.

    ``excess`` is zero where rounding decides it, and where the constant that closes it leaves the potential no digits.
    """

    log_rows: Tensor  # of what the queries send, (..., n)
    log_mass: Tensor  # of what the keys receive, (..., m)
    log_target: Tensor  # of the mass at which the keys would be content, (..., m)
    normaliser: Tensor  # log of that of the rows, (..., n)
    mass: Tensor  # (..., m)
    target: Tensor  # (..., m)
    log_scale: Tensor | None  # of the larger total, (..., 1); ``None`` for zero, in balanced problems
    excess: Tensor | None  # log of total target over total mass, (..., 1); ``None`` in balanced problems

    @cached_property
    def row_mass(self) -> Tensor:
        """What the queries send, shape (..., n)."""
        return (self.log_rows if self.log_scale is None else self.log_rows - self.log_scale).exp()

    @cached_property
    def log_ratio(self) -> Tensor:
        """Log of target over mass, nats, shape (..., m); zero on keys that carry nothing."""
        return (self.log_target - self.log_mass).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)

    @cached_property
    def error(self) -> Tensor:
        """Summed distance of mass and target, relative to the larger total, shape of the batch."""
        return torch.linalg.vector_norm(self.mass - self.target, 1, dim=-1)


class Residuals:
    """Compares what the keys receive with what they should, ``key_marginal exp(-key_potential / key_penalty)``.

    The difference is the gradient of the dual after the queries answered, so it vanishes exactly at the optimum. What
    does not depend on the potential is prepared once; on a GPU a call asks nothing of the host.

    Source: optimality conditions, Chizat et al. 2018.
    """

    def __init__(self, problem: TransportProblem, epsilon: Number) -> None:
        assert problem.key_marginal is not None
        self.problem, self.epsilon = problem, epsilon
        growth = 1.0 - penalty_share(problem.query_penalty, epsilon)
        self._exchange = problem.affinity.exchange(epsilon, problem.query_marginal.log(), growth)
        self._target, self._log_target = problem.key_marginal, problem.key_marginal.log()
        self._digit = torch.finfo(problem.affinity.dtype).eps
        coldest = float(epsilon.min()) if isinstance(epsilon, Tensor) else epsilon
        self._noise = _ROUNDINGS * self._digit * max(1.0, problem.affinity.largest / coldest)
        self._reach = _COARSEST * epsilon / self._digit * stiffness(problem, epsilon)

    def __call__(self, key_potential: Tensor) -> MarginalResidual:
        """Return the residual at a key potential of shape (..., m), cost units."""
        problem = self.problem
        log_rows, log_mass, normaliser = self._exchange(key_potential)
        if problem.is_balanced:
            mass = log_mass.exp()
            return MarginalResidual(log_rows, log_mass, self._log_target, normaliser, mass, self._target, None, None)
        log_target = self._log_target
        if not is_constraint(problem.key_penalty):
            log_target = plus(log_target, key_potential, -1.0 / problem.key_penalty)
            log_target = log_target.nan_to_num(-math.inf, math.inf, -math.inf)  # removed keys: -inf + inf
        both = torch.stack(torch.broadcast_tensors(log_mass, log_target))
        totals = both.logsumexp(-1, keepdim=True)
        log_scale = totals.amax(0)
        mass, target = (both - log_scale).exp().unbind()
        excess = hardshrink(totals[1] - totals[0], self._noise)
        excess = torch.where(excess.abs() < self._reach, excess, 0.0)
        return MarginalResidual(log_rows, log_mass, log_target, normaliser, mass, target, log_scale, excess)

    @property
    def scaling(self) -> Scaling | None:
        """The scaling form, where it is at hand and both marginals are hard: then several iterations may go in one."""
        return self._exchange if isinstance(self._exchange, Scaling) and self.problem.is_balanced else None

    def rounding(self, key_potential: Tensor, residual: MarginalResidual) -> tuple[float, Tensor]:
        """The error that rounding leaves at least and at most, relative to the total mass, the latter (...).

        A logit with weight is as large as the normaliser of its row and the potential of its key, in nats; its rounding
        is a relative error of the mass. So the numbers met are averaged over the mass, with the products that made a
        factored score, and the levels of the sums. Rows that one key has all to itself feel none of it: then the least,
        which is that of the sums, can be reached.
        """
        levels = _CONSTANT + math.log2(max(self.problem.affinity.shape[-2:]))
        products = self.problem.affinity.product_size / self.epsilon
        keys = (residual.mass * key_potential.abs().nan_to_num(0.0, 0.0, 0.0)).sum(-1, keepdim=True) / self.epsilon
        rows = (residual.row_mass * residual.normaliser.abs().nan_to_num(0.0, 0.0, 0.0)).sum(-1, keepdim=True)
        if not is_constraint(self.problem.key_penalty):
            keys = keys * (1.0 + self.epsilon / self.problem.key_penalty)
        most = _FLOOR * self._digit * (levels + products + keys + rows)
        return self._digit * levels, most.squeeze(-1).expand(self.problem.batch_shape)


def marginal_residual(problem: TransportProblem, key_potential: Tensor) -> MarginalResidual:
    """The residual at a key potential (..., m), once, at the problem's own temperature."""
    return Residuals(problem, problem.epsilon)(key_potential)


def stiffness(problem: TransportProblem, epsilon: Number) -> Number:
    """Nats per cost unit by which a constant added to the key potential brings total target and total mass together.

    The queries answering, a constant c multiplies the mass by ``exp(c / (query_penalty + epsilon))`` and the target by
    ``exp(-c / key_penalty)``; zero in balanced problems, where the constant is free.
    """
    queries = 0.0 if is_constraint(problem.query_penalty) else 1.0 / (problem.query_penalty + epsilon)
    keys = 0.0 if is_constraint(problem.key_penalty) else 1.0 / problem.key_penalty
    return queries + keys


def starting_potential(problem: TransportProblem) -> Tensor:
    """Zero on keys that carry mass, -inf on keys without, +inf on keys with mass that nobody may use: (..., m)."""
    assert problem.key_marginal is not None
    start = torch.where(problem.affinity.reachable(problem.query_marginal > 0), 0.0, math.inf)
    start = torch.where(problem.key_marginal > 0, start, -math.inf).to(problem.query_marginal.dtype)
    return start.expand(*problem.batch_shape, problem.num_keys).contiguous()
