"""Newton's method on the semi-dual in the key potential, safeguarded by Sinkhorn's iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eotattn.transport.optimality.curvature import solve_curvature
from eotattn.transport.optimality.residual import MarginalResidual, Residuals
from eotattn.transport.solvers.iteration import IterativeSolver, Step
from eotattn.transport.solvers.sinkhorn import sinkhorn_step

__all__ = ["Newton"]

#: Halvings of the step in the line search; the step may span a million temperatures.
_HALVINGS = 26


@dataclass(frozen=True, kw_only=True)
class Newton(IterativeSolver):
    """A Sinkhorn step, then a Newton step whose length an exact line search decides, problem by problem.

    Sinkhorn's iteration is safe but slows down as epsilon falls; Newton's converges quadratically near the optimum,
    and its line search on the concave dual makes it safe far away. The cost is that of three Sinkhorn steps, thirty
    where the full step does not halve the error, and one linear system of the size of the keys: dense where the scores
    are, by conjugate gradients where the problem is factored.

    Args:
        tolerance: See ``IterativeSolver``.
        max_iterations: Steps a problem may take.

    Example:
        >>> Newton().max_iterations
        200

    Source: semi-dual Newton as in Brauer et al. 2017.
    """

    max_iterations: int = 200

    asks_host: ClassVar[bool] = True

    def step(self, residuals: Residuals) -> Step:
        """See ``IterativeSolver``."""

        def advance(key_potential: Tensor, residual: MarginalResidual) -> Tensor:
            base = sinkhorn_step(residuals, key_potential, residual)
            start = residuals(base)
            direction = residuals.epsilon * _direction(residuals, base, start)
            # Where keys hardly compete the curvature is flat and the direction huge; the range is all that is needed.
            reach = residuals.problem.affinity.spread + 100 * residuals.epsilon
            size = direction.abs().amax(-1, keepdim=True)
            direction = direction * (reach / torch.maximum(size, torch.as_tensor(reach, dtype=size.dtype)))
            accepted = residuals(base + direction).error <= 0.5 * start.error
            length = torch.ones_like(start.error)
            if not bool(accepted.all()):
                length = torch.where(accepted, length, _line_search(residuals, base, direction))
            return base + length[..., None] * direction

        return advance


def _line_search(residuals: Residuals, base: Tensor, direction: Tensor) -> Tensor:
    """The largest fraction of the step that still climbs; the dual is concave, so its slope changes sign once."""
    low = torch.zeros(residuals.problem.batch_shape, dtype=base.dtype, device=base.device)
    high = torch.ones_like(low)
    middle = high
    for _ in range(_HALVINGS):
        trial = residuals(base + middle[..., None] * direction)
        climbs = ((trial.target - trial.mass) * direction).sum(-1) >= 0
        low = torch.where(climbs, middle, low)
        high = torch.where(climbs, high, middle)
        middle = 0.5 * (low + high)
    return low


def _direction(residuals: Residuals, key_potential: Tensor, residual: MarginalResidual) -> Tensor:
    """The Newton direction in nats; zero where it is not finite."""
    problem, right = residuals.problem, residual.target - residual.mass
    if problem.is_balanced:
        right = right - right.sum(-1, keepdim=True) * residual.mass
    epsilon = residuals.epsilon
    direction = solve_curvature(problem, key_potential, residual.row_mass, residual.target, right, epsilon)
    return torch.where(direction.isfinite().all(-1, keepdim=True), direction, 0.0)
