"""From a coupling that nearly satisfies its constraints to one that does, so that the primal value is a true bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eotattn.transport.keys import solve_curvature
from eotattn.transport.problem import TransportProblem

__all__ = ["feasible_coupling"]

#: Mass, in machine epsilons of the total, that may be dropped rather than put on a forbidden pair.
_DROPPED = 64


def feasible_coupling(problem: TransportProblem, weights: Tensor, row_mass: Tensor) -> Tensor:
    """Return a coupling near ``row_mass_i weights_ij`` that satisfies the constraints of the problem.

    Soft and free sides need nothing. A hard key side with soft queries rescales columns. Two hard sides are rounded:
    the coupling is first corrected on its own support, by the least relative change that repairs the marginals to
    first order; then rows and columns are shrunk to their marginals and what is missing is spread as a product. What
    the product puts on a forbidden pair is dropped if it is rounding, and otherwise stays, so that the primal value
    is +inf.

    Args:
        problem: The problem.
        weights: Shape (..., n, m), rows sum to one.
        row_mass: Shape (..., n); the query marginal, where that is a constraint.

    Returns:
        A feasible coupling, shape (..., n, m).

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.25, 0.75]))
        >>> feasible_coupling(problem, torch.tensor([[0.5, 0.5]]), torch.ones(1))
        tensor([[0.2500, 0.7500]])

    Source: product rounding, Altschuler et al. 2017; correction on the support, original.
    """
    coupling = row_mass[..., None] * weights
    if problem.key_marginal is None or not math.isinf(problem.key_penalty):
        return coupling
    if not problem.is_balanced:
        return _shrink(coupling, problem.key_marginal, -2, upper=math.inf)
    return _spread(problem, _correct_on_support(problem, coupling, weights, row_mass))


def _shrink(coupling: Tensor, marginal: Tensor, dim: int, *, upper: float) -> Tensor:
    """Scale along ``dim`` towards the marginal, by at most ``upper``."""
    mass = coupling.sum(dim)
    factor = torch.where(mass > 0, marginal / torch.where(mass > 0, mass, 1.0), 0.0).clamp(max=upper)
    return coupling * factor.unsqueeze(dim)


def _correct_on_support(problem: TransportProblem, coupling: Tensor, weights: Tensor, row_mass: Tensor) -> Tensor:
    """Multiply by 1 + u_i + v_j such that the marginals hold to first order; negative factors become zero."""
    assert problem.key_marginal is not None
    missing = problem.key_marginal - coupling.sum(-2)
    column = solve_curvature(problem, weights, row_mass, problem.key_marginal, missing, problem.epsilon)
    row = -(weights @ column.unsqueeze(-1)).squeeze(-1)
    return coupling * (1 + row[..., None] + column[..., None, :]).clamp(min=0)


def _spread(problem: TransportProblem, coupling: Tensor) -> Tensor:
    """Shrink to the marginals and spread what is missing as a product."""
    assert problem.key_marginal is not None
    coupling = _shrink(coupling, problem.query_marginal, -1, upper=1.0)
    coupling = _shrink(coupling, problem.key_marginal, -2, upper=1.0)
    rows = (problem.query_marginal - coupling.sum(-1)).clamp(min=0)
    columns = (problem.key_marginal - coupling.sum(-2)).clamp(min=0)
    total = columns.sum(-1)[..., None, None]
    product = rows[..., None] * columns[..., None, :] / torch.where(total > 0, total, 1.0)
    if problem.log_prior is not None:
        forbidden = problem.log_prior == -math.inf
        misplaced = (product * forbidden).sum((-2, -1), keepdim=True)
        rounding = misplaced <= _DROPPED * torch.finfo(product.dtype).eps
        product = torch.where(forbidden & rounding, 0.0, product)
    return coupling + product
