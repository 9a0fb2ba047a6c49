"""The Sinkhorn divergence: entropic transport without its bias, zero between a measure and itself."""

# Legend: n, m points of the two measures, d dimensions; the leading dimensions (...) are a batch.

from __future__ import annotations

import math

from torch import Tensor

from eotattn.transport.problems import TransportProblem
from eotattn.transport.solvers.solver import Solver
from eotattn.transport.solving import solve

__all__ = ["sinkhorn_divergence"]


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    x_mass: Tensor | None = None,
    y_mass: Tensor | None = None,
    penalty: float = math.inf,
    solver: Solver | str = "auto",
) -> Tensor:
    """Compute the Sinkhorn divergence of two point clouds under the squared Euclidean distance; differentiable.

    ``S(a, b) = OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 + epsilon / 2 (mass(a) - mass(b))^2`` with
    ``OT(a, b) = min <P, |x - y|^2> + epsilon KL(P || a b^T) + penalty KL(P 1 || a) + penalty KL(P^T 1 || b)``. It is
    never negative, zero only between equal measures, and tends to squared Wasserstein distance as epsilon falls.

    Args:
        x: Points, shape (..., n, d), float32 or float64.
        y: Points, shape (..., m, d), the same dtype.
        epsilon: Temperature, squared distance.
        x_mass: Shape (..., n), positive or zero; ``None`` is uniform, 1 / n each.
        y_mass: Shape (..., m), likewise.
        penalty: Squared distance, in (0, inf]; finite for measures of unequal mass.
        solver: See ``solve``.

    Returns:
        Squared distance, shape of the batch.

    Raises:
        TypeError, ValueError: As ``TransportProblem.from_points``.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> round(float(sinkhorn_divergence(x, x + 2, epsilon=0.5)), 3)
        4.0

    Source: Genevay et al. 2018; Feydy et al. 2019; unequal masses, Sejourne et al. 2019.
    """
    sides = [
        (points, points.new_full((points.shape[-2],), 1 / points.shape[-2]) if mass is None else mass)
        for points, mass in ((x, x_mass), (y, y_mass))
    ]

    def value(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
        problem = TransportProblem.from_points(
            first[0],
            second[0],
            epsilon=epsilon,
            log_prior=second[1].log()[..., None, :],
            query_marginal=first[1],
            key_marginal=second[1],
            query_penalty=penalty,
            key_penalty=penalty,
        )
        return solve(problem, solver).dual

    first, second = sides
    own = value(first, first) + value(second, second)
    unequal = (first[1].sum(-1) - second[1].sum(-1)).square()
    return value(first, second) - 0.5 * own + 0.5 * epsilon * unequal
