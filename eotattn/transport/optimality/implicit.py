"""Exact gradients at the optimum: the implicit function theorem for potentials, the envelope theorem for values."""

# Both functions differentiate through fresh aliases of the problem's tensors. The aliases separate the direct
# dependence on a tensor from the one that runs through the optimal potentials, and keep the backward differentiable.

from __future__ import annotations

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


def _weighted_residual(problem: TransportProblem, key_potential: Tensor, weight: Tensor) -> Tensor:
    """``sum_j weight_j (target_j - mass_j)``, shape of the batch; keys that carry nothing have no residual."""
    assert problem.key_marginal is not None
    live = key_potential.isfinite()
    weight = torch.where(live, weight, 0.0)
    mass = row_mass(problem, respond(problem, key_potential))
    average = problem.affinity.average(key_potential, weight[..., None], problem.epsilon).squeeze(-1)
    target = problem.key_marginal * (-torch.where(live, key_potential, 0.0) / problem.key_penalty).exp()
    return ((weight * target).sum(-1) - (mass * average).sum(-1)).expand(problem.batch_shape)


def _aliases(problem: TransportProblem, tensors: tuple[Tensor | None, ...]) -> tuple[TransportProblem, list[Tensor]]:
    """The problem over fresh aliases of its tensors, and those aliases that want a gradient."""
    aliased = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    wanted = [tensor for tensor in aliased if tensor is not None and tensor.requires_grad]
    return problem.with_leaves(*aliased), wanted


def _distribute(
    tensors: tuple[Tensor | None, ...], output: Tensor, wanted: list[Tensor], cotangent: Tensor
) -> list[Tensor | None]:
    """The product of ``cotangent`` with the derivative of ``output``, in the order of ``tensors``."""
    create = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(output, wanted, cotangent, create_graph=create, allow_unused=True))
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in tensors]


class _KeyPotential(torch.autograd.Function):
    """The optimal key potential as a function of the problem's tensors."""

    @staticmethod
    def forward(ctx: Any, problem: TransportProblem, key_potential: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.problem = problem.with_leaves(*(None if x is None else x.detach() for x in tensors))
        value = key_potential.clone()
        ctx.save_for_backward(value, *tensors)
        return value

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        key_potential, *tensors = ctx.saved_tensors
        weight = _implicit_weight(ctx.problem.with_leaves(*tensors), key_potential, cotangents[0])
        create = torch.is_grad_enabled()
        with torch.enable_grad():
            problem, wanted = _aliases(ctx.problem, tuple(tensors))
            residual = _weighted_residual(problem, key_potential, weight)
        with torch.set_grad_enabled(create):
            gradients = _distribute(tuple(tensors), residual, wanted, torch.ones_like(residual))
        return None, None, *gradients


def _implicit_weight(problem: TransportProblem, key_potential: Tensor, cotangent: Tensor) -> Tensor:
    """Solve the curvature against a cotangent."""
    response = respond(problem, key_potential)
    mass = row_mass(problem, response)
    assert problem.key_marginal is not None
    price = torch.where(key_potential.isfinite(), key_potential, 0.0)
    target = problem.key_marginal * (-price / problem.key_penalty).exp()
    cotangent = torch.where(key_potential.isfinite(), cotangent, 0.0)
    solved = solve_curvature(problem, key_potential, mass, target, cotangent, problem.epsilon)
    return problem.epsilon * solved


class _EnvelopeValue(torch.autograd.Function):
    """The dual value, differentiated with the potentials held."""

    @staticmethod
    def forward(
        ctx: Any, problem: TransportProblem, query_potential: Tensor, key_potential: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        ctx.problem = problem.with_leaves(*(None if x is None else x.detach() for x in tensors))
        ctx.save_for_backward(query_potential, key_potential, *tensors)
        return dual_objective(ctx.problem, query_potential, key_potential)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        query_potential, key_potential, *tensors = ctx.saved_tensors
        create = torch.is_grad_enabled()
        with torch.enable_grad():
            problem, wanted = _aliases(ctx.problem, tuple(tensors))
            value = dual_objective(problem, query_potential, key_potential)
        with torch.set_grad_enabled(create):
            gradients = _distribute(tuple(tensors), value, wanted, cotangents[0])
        return None, None, None, *gradients
