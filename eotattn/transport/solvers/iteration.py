"""What the iterative solvers share: the loop with one status a problem, and the schedule of temperatures."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from eotattn.transport.optimality.keys import Balance, KeyBalance, starting_potential
from eotattn.transport.problems import TransportProblem
from eotattn.transport.solvers.recorded import repeat_while

__all__ = ["Step", "default_tolerance", "iterate", "temperatures"]

#: Takes the problem, the key potential, its balance and the temperature; returns the next potential.
Step = Callable[[TransportProblem, Tensor, KeyBalance, float], Tensor]

#: Machine epsilons of error that a converged solution may keep, and the share of the mass that it may misplace at most.
_FLOOR = 128
_LARGEST = 1e-3
#: Warmer temperatures only guide the way, so they need no accuracy and little time.
_GUIDING_TOLERANCE = 1e-2
_GUIDING_ITERATIONS = 30


def default_tolerance(problem: TransportProblem) -> float:
    """Return the error that rounding alone leaves: 128 machine epsilons, times the largest |score| / epsilon above one.

    At most a thousandth of the mass: where rounding leaves more, no solution counts as converged.

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
    return min(_LARGEST, _FLOOR * torch.finfo(problem.query_marginal.dtype).eps * max(1.0, logits))


def temperatures(problem: TransportProblem) -> list[float]:
    """Return the temperatures to pass through: from a hundredth of the range of the scores, by tens, to epsilon.

    Args:
        problem: The problem.

    Returns:
        Descending temperatures, cost units, ending in the problem's own.

    Example:
        >>> temperatures(TransportProblem(torch.tensor([[0.0, 1000.0]])))
        [10.0, 1.0]

    Source: epsilon scaling, Schmitzer 2019.
    """
    steps = math.log10(max(1.0, problem.affinity.spread / (100 * problem.epsilon)))
    return [problem.epsilon * 10.0**level for level in range(math.floor(steps), -1, -1)]


def iterate(
    problem: TransportProblem,
    step: Step,
    tolerance: float,
    max_iterations: int,
    *,
    start: Tensor | None = None,
    asks_host: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Repeat ``step`` down the temperatures until every problem of the batch has converged or time is up.

    A problem that has converged is frozen, so each ends where it would have ended alone on the same temperatures.

    Args:
        problem: The problem, with a key marginal; gradients are not followed.
        step: One improvement of the key potential.
        tolerance: Bound for the error of ``KeyBalance``, a fraction of the total mass.
        max_iterations: Steps a problem may take, all temperatures together.
        start: Potential to start from, at the problem's own temperature; ``None`` starts from nothing.
        asks_host: Whether the step reads numbers back; one that does not is recorded and repeated on a GPU.

    Returns:
        ``(key_potential, num_iterations, converged)``, shapes (..., m), (...), (...).

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.5, 0.5]))
        >>> iterate(problem, lambda problem, potential, state, epsilon: potential, 1e-6, 10)[2]
        tensor(True)

    Source: original.
    """
    potential = starting_potential(problem)
    schedule = temperatures(problem) if start is None else [problem.epsilon]
    if start is not None:
        potential = torch.where(potential.isfinite(), start, potential)
    count = torch.zeros(problem.batch_shape, dtype=torch.int64, device=potential.device)
    for epsilon in schedule:
        final = epsilon == problem.epsilon
        bound = tolerance if final else max(tolerance, _GUIDING_TOLERANCE)
        allowed = max_iterations if final else (count + _GUIDING_ITERATIONS).clamp(max=max_iterations)
        level = _Level(problem, step, epsilon, potential, count, bound, allowed)
        if asks_host or potential.device.type != "cuda":
            while level.look():
                level.move()
        else:
            repeat_while(level.advance, level.running, hands_on=not problem.affinity.holds_pairs)
    return potential, count, level.done


class _Level:
    """The iterations at one temperature; ``potential`` and ``count`` are changed in place."""

    def __init__(
        self,
        problem: TransportProblem,
        step: Step,
        epsilon: float,
        potential: Tensor,
        count: Tensor,
        bound: float,
        allowed: int | Tensor,
    ) -> None:
        self.problem, self.step, self.epsilon, self.bound, self.allowed = problem, step, epsilon, bound, allowed
        self.potential, self.count = potential, count
        self.done = torch.zeros_like(count, dtype=torch.bool)
        self.running = torch.ones((), dtype=torch.bool, device=count.device)
        self.balance = Balance(problem, epsilon)

    def look(self) -> Tensor:
        """Draw the balance, and return whether any problem goes on."""
        self.state = self.balance(self.potential)
        torch.le(self.state.error, self.bound, out=self.done)
        self.active = (self.count < self.allowed) > self.done  # the first and not the second
        return torch.any(self.active.flatten(), dim=0, out=self.running)

    def move(self) -> None:
        """Take the step where a problem goes on."""
        found = self.step(self.problem, self.potential, self.state, self.epsilon)
        torch.where(self.active[..., None], found, self.potential, out=self.potential)
        self.count.add_(self.active)

    def advance(self) -> None:
        """Both; once nothing is running this changes nothing."""
        self.look()
        self.move()
