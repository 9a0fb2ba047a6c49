"""The problem as seen from the keys: their mass, their target and the residual between them."""

# Legend: n queries, m keys; the leading dimensions are a batch. The queries always give their best answer.

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from eotattn.transport.optimality.response import QueryResponse, penalty_share
from eotattn.transport.problems import TransportProblem

__all__ = ["Balance", "KeyBalance", "balance", "query_price", "starting_potential", "stiffness"]

#: Machine epsilons of a logit within which totals count as equal; nats that the last digit of a potential may be worth.
_ROUNDINGS = 4
_COARSEST = 0.1


@dataclass(frozen=True, eq=False)
class KeyBalance:
    """What a ``Balance`` returns; all masses are relative to ``exp(log_scale)``.

    Args:
        log_rows: Log of what the queries send, nats, shape (..., n).
        log_mass: Log of what the keys receive, nats, shape (..., m); -inf on keys that carry nothing, as is the next.
        log_target: Log of the mass at which the keys would be content, nats, shape (..., m).
        mass: What the keys receive, shape (..., m).
        target: The mass at which the keys would be content, shape (..., m).
        log_scale: Log of the larger total, nats, shape (..., 1); ``None`` for zero, in balanced problems.
        excess: Log of the total target over the total mass, nats, shape (..., 1); zero where rounding decides it, and
            where the constant that would close it leaves the potential no digits; ``None`` in balanced problems.

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.25, 0.75]))
        >>> float(balance(problem, torch.zeros(2)).error)
        0.5

    Source: original.
    """

    log_rows: Tensor
    log_mass: Tensor
    log_target: Tensor
    mass: Tensor
    target: Tensor
    log_scale: Tensor | None
    excess: Tensor | None

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


class Balance:
    """Compares what the keys receive with what they should, ``key_marginal exp(-key_potential / key_penalty)``.

    The difference is the gradient of the dual after the queries answered, so it vanishes exactly at the optimum. What
    does not depend on the potential is prepared once, and a call asks nothing of the host.

    Args:
        problem: The problem, with a key marginal.
        epsilon: Temperature, cost units.

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.25, 0.75]))
        >>> Balance(problem, 1.0)(torch.zeros(2)).log_ratio.exp()
        tensor([0.5000, 1.5000])

    Source: optimality conditions, Chizat et al. 2018.
    """

    def __init__(self, problem: TransportProblem, epsilon: float) -> None:
        assert problem.key_marginal is not None
        self._problem = problem
        growth = 1.0 - penalty_share(problem.query_penalty, epsilon)
        self._exchange = problem.affinity.exchange(epsilon, problem.query_marginal.log(), growth)
        self._target, self._log_target = problem.key_marginal, problem.key_marginal.log()
        rounding = torch.finfo(problem.affinity.dtype).eps
        self._noise = _ROUNDINGS * rounding * max(1.0, problem.affinity.largest / epsilon)
        self._reach = _COARSEST * epsilon / rounding * stiffness(problem, epsilon)

    def __call__(self, key_potential: Tensor) -> KeyBalance:
        """Return the balance at a key potential of shape (..., m), cost units."""
        problem = self._problem
        log_rows, log_mass = self._exchange(key_potential)
        if problem.is_balanced:
            return KeyBalance(log_rows, log_mass, self._log_target, log_mass.exp(), self._target, None, None)
        log_target = self._log_target
        if math.isfinite(problem.key_penalty):
            log_target = torch.sub(log_target, key_potential, alpha=1.0 / problem.key_penalty)
            log_target = log_target.nan_to_num(-math.inf, math.inf, -math.inf)  # removed keys: -inf + inf
        both = torch.stack(torch.broadcast_tensors(log_mass, log_target))
        totals = both.logsumexp(-1, keepdim=True)
        log_scale = totals.amax(0)
        mass, target = (both - log_scale).exp().unbind()
        excess = hardshrink(totals[1] - totals[0], self._noise)
        excess = torch.where(excess.abs() < self._reach, excess, 0.0)
        return KeyBalance(log_rows, log_mass, log_target, mass, target, log_scale, excess)


def balance(problem: TransportProblem, key_potential: Tensor, *, epsilon: float | None = None) -> KeyBalance:
    """Compare what the keys receive with what they should, once; see ``Balance``.

    Args:
        problem: The problem, with a key marginal.
        key_potential: Cost units, shape (..., m).
        epsilon: Another temperature than the problem's; ``None`` is its own.

    Returns:
        The balance; see ``KeyBalance``.

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.25, 0.75]))
        >>> balance(problem, torch.zeros(2)).log_ratio.exp()
        tensor([0.5000, 1.5000])

    Source: as for ``Balance``.
    """
    return Balance(problem, problem.epsilon if epsilon is None else epsilon)(key_potential)


def stiffness(problem: TransportProblem, epsilon: float) -> float:
    """Return how many nats a constant added to the key potential brings total target and total mass together.

    The queries answering, a constant c multiplies the mass by ``exp(c / (query_penalty + epsilon))`` and the target by
    ``exp(-c / key_penalty)``.

    Args:
        problem: The problem, with a key marginal.
        epsilon: Temperature, cost units.

    Returns:
        Nats per cost unit; zero in balanced problems, where the constant is free.

    Example:
        >>> stiffness(TransportProblem(torch.zeros(1, 2), key_marginal=torch.ones(2), key_penalty=4.0), 1.0)
        0.25

    Source: Sejourne et al. 2022.
    """
    return 1 / (problem.query_penalty + epsilon) + 1 / problem.key_penalty


def query_price(problem: TransportProblem, response: QueryResponse, epsilon: float) -> Tensor:
    """Return the price at which keys see queries: ``epsilon log row_mass_i - soft_maximum_i``.

    With it ``coupling_ij = exp((score_ij + key_potential_j + price_i) / epsilon + log_prior_ij)``, so the mass of the
    keys is a soft maximum over the queries.

    Args:
        problem: The problem.
        response: Of the queries, at ``epsilon``.
        epsilon: Temperature, cost units.

    Returns:
        Cost units, shape (..., n); -inf, and without gradient, for queries without mass.

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2))
        >>> from eotattn.transport.optimality.response import respond
        >>> query_price(problem, respond(problem, torch.zeros(2)), 1.0)
        tensor([-0.6931])

    Source: original.
    """
    sends = problem.query_marginal > 0
    log_marginal = torch.where(sends, problem.query_marginal, 1.0).log()
    price = epsilon * (log_marginal + response.log_growth) - response.soft_maximum
    return torch.where(sends, price, -math.inf)


def starting_potential(problem: TransportProblem) -> Tensor:
    """Return zero on keys that carry mass, -inf on keys without, +inf on keys with mass that nobody may use.

    Args:
        problem: The problem, with a key marginal.

    Returns:
        Cost units, shape (..., m), expanded over the batch.

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.0, 1.0]))
        >>> starting_potential(problem)
        tensor([-inf, 0.])

    Source: original.
    """
    assert problem.key_marginal is not None
    start = torch.where(problem.affinity.reachable(problem.query_marginal > 0), 0.0, math.inf)
    start = torch.where(problem.key_marginal > 0, start, -math.inf).to(problem.query_marginal.dtype)
    return start.expand(*problem.batch_shape, problem.num_keys).contiguous()
