"""The best answer of the queries to given key potentials: one soft c-transform, for every problem and solver."""

# Legend: n queries, m keys; the leading dimensions are a batch.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.transport.problems import TransportProblem
from eotattn.transport.problems.affinity import Number, Rows, is_constraint

__all__ = ["QueryResponse", "coupling_rows", "loaded_potential", "penalty_share", "respond", "row_mass", "scaled"]


@dataclass(frozen=True, eq=False)
class QueryResponse:
    """What ``respond`` returns, each (..., n)."""

    potential: Tensor  # optimal query potential, cost units
    log_growth: Tensor  # log of row mass over query marginal, nats; zero under an infinite query penalty
    transform: Tensor  # soft c-transform of the key potential, cost units


def penalty_share(penalty: Number, epsilon: Number) -> Number:
    """Return ``penalty / (penalty + epsilon)``, the exponent of a penalised scaling step; one for a constraint.

    Source: Chizat et al. 2018.
    """
    return 1.0 if is_constraint(penalty) else penalty / (penalty + epsilon)


def respond(problem: TransportProblem, key_potential: Tensor, *, epsilon: Number | None = None) -> QueryResponse:
    """Maximise the dual over the query potential, in closed form; differentiable.

    ``potential = share * soft_c_transform(key_potential)`` with ``share = query_penalty / (query_penalty + epsilon)``.
    Another ``epsilon`` than the problem's serves continuation.

    Source: closed form, Litman 2025, arXiv 2508.08369; with penalties, Chizat et al. 2018.
    """
    epsilon = problem.epsilon if epsilon is None else epsilon
    share = penalty_share(problem.query_penalty, epsilon)
    transform = problem.affinity.soft_c_transform(key_potential, epsilon)
    return QueryResponse(share * transform, (share - 1.0) / epsilon * transform, transform)


def row_mass(problem: TransportProblem, response: QueryResponse) -> Tensor:
    """``query_marginal exp(log_growth)``, what the queries send, (..., n); zero for a query without mass."""
    growth = response.log_growth.exp()
    usable = (problem.query_marginal > 0) | growth.isfinite()
    return torch.where(usable, problem.query_marginal * torch.where(usable, growth, 0.0), 0.0)


def loaded_potential(problem: TransportProblem, response: QueryResponse, epsilon: Number) -> Tensor:
    """The query potential with the log of what queries send put in, cost units, (..., n).

    ``coupling_ij = exp((score_ij + key_potential_j + loaded_i) / epsilon + log_prior_ij)``, so the mass of the keys is
    a soft c-transform over the queries. It is -inf, and without gradient, for queries without mass.
    """
    sends = problem.query_marginal > 0
    log_marginal = torch.where(sends, problem.query_marginal, 1.0).log()
    return torch.where(sends, epsilon * (log_marginal + response.log_growth) + response.transform, -math.inf)


def coupling_rows(problem: TransportProblem, key_potential: Tensor) -> Callable[[Rows], Tensor]:
    """Return what forms rows of the coupling, shape (..., r, m), in the dtype of the problem."""
    mass = row_mass(problem, respond(problem, key_potential))

    def rows(index: Rows) -> Tensor:
        weights = problem.affinity.weights(key_potential, problem.epsilon, index)
        return scaled(mass[..., index], weights)

    return rows


def scaled(mass: Tensor, rows: Tensor) -> Tensor:
    """Rows times their mass; a soft side may ask for more mass than the dtype holds, and inf * 0 would be NaN."""
    return torch.where(mass.isinf()[..., None] & (rows == 0), 0.0, mass[..., None] * rows)
