"""The curvature of the dual in the key potential, and linear systems with it: assembled, or by products alone."""

# Legend: n queries, m keys; the leading dimensions are a batch. The queries always answer by `respond`.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eotattn.transport.arithmetic import product, solve_symmetric
from eotattn.transport.optimality.response import penalty_share, respond
from eotattn.transport.problems import TransportProblem
from eotattn.transport.problems.affinity import Number, pairwise

__all__ = ["solve_curvature"]

#: Most products of the conjugate gradients, and the residual at which they stop, in machine epsilons.
_MAX_PRODUCTS = 1000
_STOP = 8


def solve_curvature(
    problem: TransportProblem, key_potential: Tensor, row_mass: Tensor, target: Tensor, right: Tensor, epsilon: Number
) -> Tensor:
    """Solve ``epsilon H x = right``, H the negative Hessian of the dual in the key potential.

    With the queries answering, ``epsilon H = diag(mass) - share W + (epsilon / key_penalty) diag(target)`` and
    ``W = weights^T diag(row_mass) weights``. Where pairs are at hand it is assembled as a graph Laplacian plus
    non-negative terms, which keeps small entries accurate, and is differentiable; otherwise conjugate gradients solve
    it, a product being two softmax averages. In a balanced problem constants are its kernel; there ``right`` must sum
    to zero, and the solution is orthogonal to the key mass. Keys without mass get zero.
    """
    solver = _assembled if problem.affinity.holds_pairs else _by_products
    return solver(problem, key_potential, row_mass, target, right, epsilon)


def _assembled(
    problem: TransportProblem, key_potential: Tensor, row_mass: Tensor, target: Tensor, right: Tensor, epsilon: Number
) -> Tensor:
    """Factorise the matrix of keys by keys."""
    weights = problem.affinity.weights(key_potential, epsilon)
    sent = weights * row_mass[..., None]
    flow, mass = product(sent.mT, weights), sent.sum(-2)
    live = mass > 0
    share = pairwise(penalty_share(problem.query_penalty, epsilon))
    off = flow - torch.diag_embed(flow.diagonal(dim1=-2, dim2=-1))
    extra = (1.0 - penalty_share(problem.query_penalty, epsilon)) * mass + (epsilon / problem.key_penalty) * target
    root = torch.where(live, mass, 1.0).sqrt()
    # share * (row sums of off) + extra equals mass - share * (diagonal of flow) + ..., without the cancellation.
    diagonal = ((share * off).sum(-1) + extra) / root.square() + 8 * torch.finfo(root.dtype).eps
    scaled = torch.diag_embed(torch.where(live, diagonal, 1.0)) - share * off / (
        root[..., :, None] * root[..., None, :]
    )
    if problem.is_balanced:
        kernel = torch.where(live, root, 0.0)
        scaled = scaled + kernel[..., :, None] * kernel[..., None, :]
    return solve_symmetric(scaled, torch.where(live, right, 0.0) / root) / root


def _by_products(
    problem: TransportProblem, key_potential: Tensor, row_mass: Tensor, target: Tensor, right: Tensor, epsilon: Number
) -> Tensor:
    """Conjugate gradients on the matrix scaled to have a diagonal near one."""
    affinity, share = problem.affinity, penalty_share(problem.query_penalty, epsilon)
    # The masses may be relative to a scale, and so may the potential: both averages are softmaxes.
    loaded = epsilon * row_mass.log() + respond(problem, key_potential, epsilon=epsilon).transform
    offered = -affinity.transposed.soft_c_transform(loaded, epsilon)
    live = key_potential.isfinite() & offered.isfinite()
    mass = torch.where(live, ((offered + torch.where(live, key_potential, 0.0)) / epsilon).exp(), 0.0)
    root = torch.where(mass > 0, mass, 1.0).sqrt()
    extra = torch.where(mass > 0, (epsilon / problem.key_penalty) * target / root.square(), 0.0)
    kernel = torch.where(mass > 0, root, 0.0)

    def product(vector: Tensor) -> Tensor:
        spread = affinity.average(key_potential, (vector / root)[..., None], epsilon)
        gathered = affinity.transposed.average(loaded, spread, epsilon).squeeze(-1)
        image = (1 + extra) * vector - share * kernel * gathered
        if problem.is_balanced:
            image = image + kernel * (kernel * vector).sum(-1, keepdim=True) / kernel.square().sum(-1, keepdim=True)
        return image

    solved = _conjugate_gradients(product, torch.where(mass > 0, right, 0.0) / root, _STOP * affinity.resolution)
    return torch.where(mass > 0, solved, 0.0) / root


def _conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor, tolerance: float) -> Tensor:
    """Solve positive definite systems, one a problem of the batch; each stops at its own relative residual."""
    solution = torch.zeros_like(right)
    residual, direction = right, right
    size = residual.square().sum(-1, keepdim=True)
    bound = tolerance**2 * size
    for _ in range(_MAX_PRODUCTS):
        active = size > bound
        if not bool(active.any()):
            break
        image = product(direction)
        bend = (direction * image).sum(-1, keepdim=True)
        active = active & (bend > 0)
        length = torch.where(active, size / torch.where(bend > 0, bend, 1.0), 0.0)
        solution = solution + length * direction
        residual = residual - length * image
        fresh = residual.square().sum(-1, keepdim=True)
        direction = residual + torch.where(active, fresh / torch.where(size > 0, size, 1.0), 0.0) * direction
        size = torch.where(active, fresh, 0.0)
    return solution
