"""What the iterative solvers share: the loop with one status a problem, and the schedule of temperatures."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from eotattn.transport.keys import KeyBalance, starting_potential
from eotattn.transport.problem import TransportProblem
from eotattn.transport.repeated import RepeatedBalance

__all__ = ["Step", "default_tolerance", "iterate", "temperatures"]

#: Takes the problem, the key potential, its balance and the temperature; returns the next potential.
Step = Callable[[TransportProblem, Tensor, KeyBalance, float], Tensor]

#: Machine epsilons of error that a converged solution may keep.
_FLOOR = 128
#: Warmer temperatures only guide the way, so they need no accuracy and little time.
_GUIDING_TOLERANCE = 1e-2
_GUIDING_ITERATIONS = 30


def default_tolerance(problem: TransportProblem) -> float:
    """Return the error that rounding alone leaves: 128 machine epsilons, times the largest |score| / epsilon above one.

    Args:
        problem: The problem.

    Returns:
        A bound for the marginal error, relative to the total mass.

    Example:
        >>> default_tolerance(TransportProblem(torch.zeros(2, 3).double())) < 1e-13
        True

    Source: original.
    """
    logits = problem.affinity.largest / problem.epsilon
    return _FLOOR * torch.finfo(problem.query_marginal.dtype).eps * max(1.0, logits)


def temperatures(problem: TransportProblem) -> list[float]:
    """Return the temperatures to pass through: from a tenth of the range of the scores, by fours, to epsilon.

    Args:
        problem: The problem.

    Returns:
        Descending temperatures, cost units, ending in the problem's own.

    Example:
        >>> temperatures(TransportProblem(torch.tensor([[0.0, 100.0]])))
        [4.0, 1.0]

    Source: epsilon scaling, Schmitzer 2019.
    """
    steps = math.log(max(1.0, problem.affinity.spread / (10 * problem.epsilon)), 4)
    return [problem.epsilon * 4.0**level for level in range(math.floor(steps), -1, -1)]


def iterate(
    problem: TransportProblem, step: Step, tolerance: float, max_iterations: int, *, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Repeat ``step`` down the temperatures until every problem of the batch has converged or time is up.

    A problem that has converged is frozen, so each ends where it would have ended alone on the same temperatures.

    Args:
        problem: The problem, with a key marginal; gradients are not followed.
        step: One improvement of the key potential.
        tolerance: Bound for the error of ``KeyBalance``, a fraction of the total mass.
        max_iterations: Steps a problem may take, all temperatures together.
        start: Potential to start from, at the problem's own temperature; ``None`` starts from nothing.

    Returns:
        ``(key_potential, num_iterations, converged)``, shapes (..., m), (...), (...).

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.5, 0.5]))
        >>> iterate(problem, lambda problem, potential, state, epsilon: potential, 1e-6, 10)[2]
        tensor(True)

    Source: original.
    """
    potential = starting_potential(problem)
    schedule = temperatures(problem)
    if start is not None:
        potential, schedule = torch.where(potential.isfinite(), start, potential), [problem.epsilon]
    count = torch.zeros(problem.batch_shape, dtype=torch.int64, device=potential.device)
    for epsilon in schedule:
        final = epsilon == problem.epsilon
        bound = tolerance if final else max(tolerance, _GUIDING_TOLERANCE)
        allowed = max_iterations if final else (count + _GUIDING_ITERATIONS).clamp(max=max_iterations)
        look = RepeatedBalance(problem, epsilon)
        while True:
            state = look(potential)
            done = state.error <= bound
            active = ~done & (count < allowed)
            if not bool(active.any()):
                break
            potential = torch.where(active[..., None], step(problem, potential, state, epsilon), potential)
            count = count + active
    return potential, count, done
