"""Sinkhorn's iteration, with hard or soft marginals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from eotattn.transport.optimality.residual import MarginalResidual, Residuals, stiffness
from eotattn.transport.optimality.response import penalty_share
from eotattn.transport.problems.affinity import Number, plus
from eotattn.transport.solvers.iteration import IterativeSolver, Step

__all__ = ["Sinkhorn", "sinkhorn_move", "sinkhorn_step"]


@dataclass(frozen=True, kw_only=True)
class Sinkhorn(IterativeSolver):
    """The plain iteration: move all keys by the best constant, then let each answer the queries.

    Two exact maximisations of the dual. The constant makes total target and total mass equal; without it, totals that
    differ take penalty / epsilon steps to meet. Then, the queries held, a key moves by
    ``epsilon share log(target / mass)`` with ``share = key_penalty / (key_penalty + epsilon)``. The queries answer when
    the next residual is drawn. In balanced problems the constant is free and stays.

    Args:
        tolerance: See ``IterativeSolver``.
        max_iterations: Steps a problem may take.

    Example:
        >>> Sinkhorn(tolerance=1e-6).max_iterations
        10000

    Source: Chizat et al. 2018; as attention, Sander et al. 2022; the constant, Sejourne et al. 2022.
    """

    stride: ClassVar[int] = 10

    def step(self, residuals: Residuals) -> Step:
        """See ``IterativeSolver``."""
        return lambda key_potential, residual: sinkhorn_step(residuals, key_potential, residual)


def sinkhorn_step(residuals: Residuals, key_potential: Tensor, residual: MarginalResidual) -> Tensor:
    """The next key potential, shape (..., m)."""
    move, length = sinkhorn_move(residuals, residual)
    return plus(key_potential, move, length)


def sinkhorn_move(residuals: Residuals, residual: MarginalResidual) -> tuple[Tensor, Number]:
    """What a step adds: nats (..., m), zero on keys without mass but for the constant, and cost units a nat."""
    problem, epsilon = residuals.problem, residuals.epsilon
    length = epsilon * penalty_share(problem.key_penalty, epsilon)
    if residual.excess is None:
        return residual.log_ratio, length
    lift = 1.0 / (length * stiffness(problem, epsilon)) - 1.0
    return plus(residual.log_ratio, residual.excess.expand_as(residual.log_ratio), lift), length
