"""Exact gradients at the optimum: the implicit function theorem for potentials, the envelope theorem for values."""

# Both functions differentiate through fresh aliases of the problem's tensors. The aliases separate the direct
# dependence on a tensor from the one that runs through the optimal potentials, and keep the backward differentiable.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eotattn.transport.optimality.curvature import solve_curvature
from eotattn.transport.optimality.objective import dual_objective
from eotattn.transport.optimality.response import respond, row_mass
from eotattn.transport.problems import TransportProblem

__all__ = ["attach_key_potential", "envelope_value"]


def attach_key_potential(problem: TransportProblem, key_potential: Tensor) -> Tensor:
    """Give an optimal key potential its gradients, and fix the gauge.

    The optimality condition ``mass(g, theta) = target(g, theta)`` of the keys, the queries answering, defines g as a
    function of the tensors theta; its derivative is ``-H^-1`` times that of the residual. In balanced problems the
    constant that is free is fixed by ``sum key_marginal * key_potential = 0``.
    """
    attached: Tensor = key_potential
    if torch.is_grad_enabled() and problem.requires_grad:
        attached = _KeyPotential.apply(problem, key_potential, *problem.leaves)
    if not problem.is_balanced:
        return attached
    assert problem.key_marginal is not None
    return attached - (problem.key_marginal * attached.nan_to_num(0.0, 0.0, 0.0)).sum(-1, keepdim=True)


def envelope_value(problem: TransportProblem, query_potential: Tensor, key_potential: Tensor) -> Tensor:
    """Return the full dual value, with the gradient that it has where the potentials are optimal.

    By the envelope theorem that is the partial derivative with the potentials held; none flows into them. A second
    derivative is right too, since it follows the potentials.
    """
    value: Tensor = _EnvelopeValue.apply(problem, query_potential, key_potential, *problem.leaves)
    return value


def _target(problem: TransportProblem, key_potential: Tensor) -> Tensor:
    """The mass at which the keys would be content, (..., m)."""
    assert problem.key_marginal is not None
    price = torch.where(key_potential.isfinite(), key_potential, 0.0)
    return problem.key_marginal * (-price / problem.key_penalty).exp()


def _weighted_residual(problem: TransportProblem, key_potential: Tensor, weight: Tensor) -> Tensor:
    """``sum_j weight_j (target_j - mass_j)``, shape of the batch; keys that carry nothing have no residual."""
    weight = torch.where(key_potential.isfinite(), weight, 0.0)
    mass = row_mass(problem, respond(problem, key_potential))
    average = problem.affinity.average(key_potential, weight[..., None], problem.epsilon).squeeze(-1)
    residual = (weight * _target(problem, key_potential)).sum(-1) - (mass * average).sum(-1)
    return residual.expand(problem.batch_shape)


def _pullback(
    problem: TransportProblem, leaves: list[Tensor | None], value: Callable[[TransportProblem], Tensor], above: Tensor
) -> list[Tensor | None]:
    """The product of ``above`` with the derivative of ``value(problem)`` in the leaves, in their order."""
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [None if leaf is None else leaf.view_as(leaf) for leaf in leaves]
        output = value(problem.with_leaves(*aliases))
    wanted = [alias for alias in aliases if alias is not None and alias.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, above, create_graph=create, allow_unused=True))
    return [None if alias is None or not alias.requires_grad else next(found) for alias in aliases]


class _KeyPotential(torch.autograd.Function):
    """The optimal key potential as a function of the problem's leaves."""

    @staticmethod
    def forward(ctx: Any, problem: TransportProblem, key_potential: Tensor, *leaves: Tensor | None) -> Tensor:
        ctx.problem = problem.detached()
        value = key_potential.clone()
        ctx.save_for_backward(value, *leaves)
        return value

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        key_potential, *leaves = ctx.saved_tensors
        problem = ctx.problem.with_leaves(*leaves)
        mass = row_mass(problem, respond(problem, key_potential))
        above = torch.where(key_potential.isfinite(), cotangents[0], 0.0)
        target = _target(problem, key_potential)
        weight = problem.epsilon * solve_curvature(problem, key_potential, mass, target, above, problem.epsilon)
        ones = weight.new_ones(problem.batch_shape)
        return None, None, *_pullback(problem, leaves, lambda one: _weighted_residual(one, key_potential, weight), ones)


class _EnvelopeValue(torch.autograd.Function):
    """The dual value, differentiated with the potentials held."""

    @staticmethod
    def forward(
        ctx: Any, problem: TransportProblem, query_potential: Tensor, key_potential: Tensor, *leaves: Tensor | None
    ) -> Tensor:
        ctx.problem = problem.detached()
        ctx.save_for_backward(query_potential, key_potential, *leaves)
        return dual_objective(ctx.problem, query_potential, key_potential)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        query, key, *leaves = ctx.saved_tensors
        gradients = _pullback(ctx.problem, leaves, lambda one: dual_objective(one, query, key), cotangents[0])
        return None, None, None, *gradients
