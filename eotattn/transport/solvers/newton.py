"""Newton's method on the semi-dual in the key potential, safeguarded by Sinkhorn's iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.transport.optimality.curvature import solve_curvature
from eotattn.transport.optimality.keys import KeyBalance, balance
from eotattn.transport.problems import TransportProblem
from eotattn.transport.solvers.sinkhorn import sinkhorn_step

__all__ = ["newton_step"]

#: Halvings of the step in the line search; the step may span a million temperatures.
_HALVINGS = 26


def newton_step(problem: TransportProblem, key_potential: Tensor, state: KeyBalance, epsilon: float) -> Tensor:
    """Take a Sinkhorn step, then a Newton step whose length an exact line search decides, problem by problem.

    Sinkhorn's iteration is safe but slows down as epsilon falls; Newton's converges quadratically near the optimum,
    and its line search on the concave dual makes it safe far away. The cost is that of three Sinkhorn steps, thirty
    where the full step does not halve the error, and one dense solve of the size of the keys.

    Args:
        problem: The problem, with a key marginal.
        key_potential: Cost units, shape (..., m).
        state: Balance at that potential.
        epsilon: Temperature, cost units.

    Returns:
        The next key potential, shape (..., m).

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.5, 0.5]))
        >>> newton_step(problem, torch.zeros(2), balance(problem, torch.zeros(2)), 1.0)
        tensor([0., 0.])

    Source: original; semi-dual Newton as in Brauer et al. 2017.
    """
    base = sinkhorn_step(problem, key_potential, state, epsilon)
    start = balance(problem, base, epsilon=epsilon)
    direction = epsilon * _direction(problem, base, start, epsilon)
    # Where keys hardly compete the curvature is flat and the direction huge; no potential needs more than the range.
    reach = problem.affinity.spread + 100 * epsilon
    direction = direction * (reach / direction.abs().amax(-1, keepdim=True).clamp(min=reach))
    full = balance(problem, base + direction, epsilon=epsilon)
    accepted = full.error <= 0.5 * start.error
    length = torch.ones_like(full.error)
    if not bool(accepted.all()):
        length = torch.where(accepted, length, _line_search(problem, base, direction, epsilon))
    return base + length[..., None] * direction


def _line_search(problem: TransportProblem, base: Tensor, direction: Tensor, epsilon: float) -> Tensor:
    """The largest fraction of the step that still climbs; the dual is concave, so its slope changes sign once."""
    low = torch.zeros(problem.batch_shape, dtype=base.dtype, device=base.device)
    high = torch.ones_like(low)
    middle = high
    for _ in range(_HALVINGS):
        trial = balance(problem, base + middle[..., None] * direction, epsilon=epsilon)
        climbs = ((trial.target - trial.mass) * direction).sum(-1) >= 0
        low = torch.where(climbs, middle, low)
        high = torch.where(climbs, high, middle)
        middle = 0.5 * (low + high)
    return low


def _direction(problem: TransportProblem, key_potential: Tensor, state: KeyBalance, epsilon: float) -> Tensor:
    """The Newton direction in nats; zero where it is not finite."""
    right = state.target - state.mass
    if problem.is_balanced:
        right = right - right.sum(-1, keepdim=True) * state.mass
    direction = solve_curvature(problem, key_potential, state.row_mass, state.target, right, epsilon)
    return torch.where(direction.isfinite().all(-1, keepdim=True), direction, 0.0)
