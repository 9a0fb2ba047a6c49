"""The problem as seen from the keys: their mass, their target and the residual between them."""

# Legend: n queries, m keys; the leading dimensions are a batch. The queries always answer by `respond`.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.transport.problem import TransportProblem
from eotattn.transport.response import QueryResponse, respond

__all__ = ["KeyBalance", "balance", "query_price", "starting_potential"]


@dataclass(frozen=True, eq=False)
class KeyBalance:
    """What ``balance`` returns; all masses are relative to ``exp(log_scale)``.

    Args:
        response: The queries' answer.
        row_mass: Shape (..., n).
        mass: Mass that the keys receive, shape (..., m).
        target: Mass at which the keys would be content, shape (..., m).
        log_ratio: Log of target over mass, nats, shape (..., m); zero on keys that carry nothing.

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.25, 0.75]))
        >>> float(balance(problem, torch.zeros(2)).error)
        0.5

    Source: original.
    """

    response: QueryResponse
    row_mass: Tensor
    mass: Tensor
    target: Tensor
    log_ratio: Tensor

    @property
    def error(self) -> Tensor:
        """Summed distance of mass and target, relative to the larger total, shape of the batch."""
        return (self.mass - self.target).abs().sum(-1)


def balance(problem: TransportProblem, key_potential: Tensor, *, epsilon: float | None = None) -> KeyBalance:
    """Compare what the keys receive with what they should: ``key_marginal exp(-key_potential / key_penalty)``.

    The difference is the gradient of the dual after the queries answered, so it vanishes exactly at the optimum.

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

    Source: optimality conditions, Chizat et al. 2018.
    """
    assert problem.key_marginal is not None
    epsilon = problem.epsilon if epsilon is None else epsilon
    response = respond(problem, key_potential, epsilon=epsilon)
    log_rows = problem.query_marginal.log() + response.log_growth
    price = torch.where(key_potential.isfinite(), key_potential, 0.0)
    offered = problem.affinity.transposed.soft_maximum(query_price(problem, response, epsilon), epsilon)
    log_mass = (offered + price) / epsilon
    live = key_potential.isfinite() & (log_mass > -math.inf)
    log_target = problem.key_marginal.log() - price / problem.key_penalty
    log_mass, log_target = (torch.where(live, value, -math.inf) for value in (log_mass, log_target))
    log_scale = torch.maximum(log_mass.logsumexp(-1), log_target.logsumexp(-1))[..., None]
    return KeyBalance(
        response,
        (log_rows - log_scale).exp(),
        (log_mass - log_scale).exp(),
        (log_target - log_scale).exp(),
        torch.where(live, log_target, 0.0) - torch.where(live, log_mass, 0.0),
    )


def query_price(problem: TransportProblem, response: QueryResponse, epsilon: float) -> Tensor:
    """Return the price at which keys see queries: ``epsilon log row_mass_i - soft_maximum_i``.

    With it ``coupling_ij = exp((score_ij + key_potential_j + price_i) / epsilon + log_prior_ij)``, so the mass of the
    keys is a soft maximum over the queries.

    Args:
        problem: The problem.
        response: Of the queries, at ``epsilon``.
        epsilon: Temperature, cost units.

    Returns:
        Cost units, shape (..., n); -inf for queries without mass.

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2))
        >>> query_price(problem, respond(problem, torch.zeros(2)), 1.0)
        tensor([-0.6931])

    Source: original.
    """
    return epsilon * (problem.query_marginal.log() + response.log_growth) - response.soft_maximum


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
