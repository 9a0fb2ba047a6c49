"""The best answer of the queries to given key potentials: one soft maximum, for every problem and solver."""

# Legend: n queries, m keys; the leading dimensions are a batch.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.transport.problems import TransportProblem
from eotattn.transport.problems.affinity import Rows

__all__ = ["QueryResponse", "coupling_rows", "penalty_share", "respond", "row_mass", "scaled"]


@dataclass(frozen=True, eq=False)
class QueryResponse:
    """What ``respond`` returns.

    Args:
        potential: Optimal query potential, cost units, shape (..., n).
        log_growth: Log of row mass over query marginal, nats, shape (..., n); zero under an infinite query penalty.
        soft_maximum: epsilon times the log-normaliser of a row, cost units, shape (..., n).

    Example:
        >>> import torch
        >>> respond(TransportProblem(torch.zeros(1, 2)), torch.zeros(2)).soft_maximum
        tensor([0.6931])

    Source: original.
    """

    potential: Tensor
    log_growth: Tensor
    soft_maximum: Tensor


def penalty_share(penalty: float, epsilon: float) -> float:
    """Return ``penalty / (penalty + epsilon)``, the exponent of a penalised scaling step; one for a constraint.

    Args:
        penalty: Cost units, in [0, inf].
        epsilon: Temperature, cost units, positive.

    Returns:
        A number in [0, 1].

    Example:
        >>> penalty_share(3.0, 1.0), penalty_share(math.inf, 1.0)
        (0.75, 1.0)

    Source: Chizat et al. 2018.
    """
    return 1.0 if math.isinf(penalty) else penalty / (penalty + epsilon)


def respond(problem: TransportProblem, key_potential: Tensor, *, epsilon: float | None = None) -> QueryResponse:
    """Maximise the dual over the query potential, in closed form; differentiable.

    ``potential = -share * epsilon * log sum_j exp((score + key_potential) / epsilon + log_prior)`` with
    ``share = query_penalty / (query_penalty + epsilon)``. A potential of -inf removes a key; one of +inf (a key out
    of everybody's reach) counts as zero.

    Args:
        problem: The problem.
        key_potential: Cost units, shape (..., m).
        epsilon: Another temperature than the problem's, for continuation; ``None`` is the problem's own.

    Returns:
        The response; see ``QueryResponse``.

    Example:
        >>> import torch
        >>> problem = TransportProblem(torch.tensor([[0.0, 1.0]]))
        >>> respond(problem, torch.zeros(2)).potential
        tensor([-1.3133])

    Source: closed form, Litman 2025, arXiv 2508.08369; with penalties, Chizat et al. 2018.
    """
    epsilon = problem.epsilon if epsilon is None else epsilon
    share = penalty_share(problem.query_penalty, epsilon)
    soft_maximum = problem.affinity.soft_maximum(key_potential, epsilon)
    return QueryResponse(-share * soft_maximum, (1.0 - share) / epsilon * soft_maximum, soft_maximum)


def row_mass(problem: TransportProblem, response: QueryResponse) -> Tensor:
    """Return ``query_marginal exp(log_growth)``, what the queries send; differentiable.

    Args:
        problem: The problem.
        response: Of its queries.

    Returns:
        Shape (..., n); zero for a query without mass, however much it would grow.

    Example:
        >>> import torch
        >>> problem = TransportProblem(torch.zeros(1, 2))
        >>> row_mass(problem, respond(problem, torch.zeros(2)))
        tensor([1.])

    Source: original.
    """
    growth = response.log_growth.exp()
    usable = (problem.query_marginal > 0) | growth.isfinite()
    return torch.where(usable, problem.query_marginal * torch.where(usable, growth, 0.0), 0.0)


def coupling_rows(problem: TransportProblem, key_potential: Tensor) -> Callable[[Rows], Tensor]:
    """Return what forms rows of the coupling, shape (..., r, m), in the dtype of the problem."""
    mass = row_mass(problem, respond(problem, key_potential))

    def rows(index: Rows) -> Tensor:
        weights = problem.affinity.log_weights(key_potential, problem.epsilon, index).exp()
        return scaled(mass[..., index], weights)

    return rows


def scaled(mass: Tensor, rows: Tensor) -> Tensor:
    """Rows times their mass; a soft side may ask for more mass than the dtype holds, and inf * 0 would be NaN."""
    return torch.where(mass.isinf()[..., None] & (rows == 0), 0.0, mass[..., None] * rows)
