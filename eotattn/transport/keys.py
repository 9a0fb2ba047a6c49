"""The problem as seen from the keys: their mass, their target, the residual between them and its curvature."""

# Legend: n queries, m keys; the leading dimensions are a batch. The queries always answer by `respond`.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.transport.admissibility import reachable_keys
from eotattn.transport.problem import TransportProblem
from eotattn.transport.response import QueryResponse, penalty_share, respond

__all__ = ["KeyBalance", "balance", "solve_curvature", "starting_potential"]


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
    response = respond(problem, key_potential, epsilon=epsilon)
    log_rows = problem.query_marginal.log() + response.log_growth
    log_mass = (log_rows[..., None] + response.log_weights).logsumexp(-2)
    live = key_potential.isfinite() & (log_mass > -math.inf)
    price = torch.where(key_potential.isfinite(), key_potential, 0.0)
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
    start = torch.where(reachable_keys(problem.log_prior, problem.query_marginal), 0.0, math.inf)
    start = torch.where(problem.key_marginal > 0, start, -math.inf).to(problem.score.dtype)
    return start.expand(*problem.batch_shape, problem.num_keys).contiguous()


def solve_curvature(
    problem: TransportProblem, weights: Tensor, row_mass: Tensor, target: Tensor, right: Tensor, epsilon: float
) -> Tensor:
    """Solve ``epsilon H x = right``, H the negative Hessian of the dual in the key potential; differentiable.

    With the queries answering, ``epsilon H = diag(mass) - share W + (epsilon / key_penalty) diag(target)`` and
    ``W = weights^T diag(row_mass) weights``. It is assembled as a graph Laplacian plus non-negative terms, which
    keeps small entries accurate. In a balanced problem constants are its kernel; there ``right`` must sum to zero,
    and the solution is orthogonal to the key mass. Keys without mass get zero.

    Args:
        problem: The problem.
        weights: Attention weights, shape (..., n, m).
        row_mass: Shape (..., n).
        target: Shape (..., m).
        right: Shape (..., m).
        epsilon: Temperature at which the weights were computed.

    Returns:
        x, shape (..., m).

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.5, 0.5]))
        >>> half, right = torch.tensor([[0.5, 0.5]]), torch.tensor([0.25, -0.25])
        >>> solve_curvature(problem, half, torch.ones(1), half[0], right, 1.0)
        tensor([ 0.5000, -0.5000])

    Source: original; semi-dual Newton systems as in Brauer et al. 2017.
    """
    flow = (weights * row_mass[..., None]).mT @ weights
    mass = (weights * row_mass[..., None]).sum(-2)
    live = mass > 0
    share = penalty_share(problem.query_penalty, epsilon)
    off = flow - torch.diag_embed(flow.diagonal(dim1=-2, dim2=-1))
    extra = (1.0 - share) * mass + (epsilon / problem.key_penalty) * target
    root = torch.where(live, mass, 1.0).sqrt()
    # share * (row sums of off) + extra equals mass - share * (diagonal of flow) + ..., without the cancellation.
    diagonal = (share * off.sum(-1) + extra) / root.square() + 8 * torch.finfo(root.dtype).eps
    scaled = torch.diag_embed(torch.where(live, diagonal, 1.0)) - share * off / (
        root[..., :, None] * root[..., None, :]
    )
    if problem.is_balanced:
        kernel = torch.where(live, root, 0.0)
        scaled = scaled + kernel[..., :, None] * kernel[..., None, :]
    right = torch.where(live, right, 0.0) / root
    return torch.linalg.solve(scaled, right.unsqueeze(-1)).squeeze(-1) / root
