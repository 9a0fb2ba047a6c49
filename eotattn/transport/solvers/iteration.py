"""What the iterative solvers share: the loop with one status a problem, and the schedule of temperatures."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_positive, check_positive_int, fail, require
from eotattn.transport.arithmetic import full_precision
from eotattn.transport.optimality.feasibility import unplaceable_mass
from eotattn.transport.optimality.implicit import attach_key_potential
from eotattn.transport.optimality.residual import MarginalResidual, Residuals, starting_potential
from eotattn.transport.optimality.response import respond, row_mass
from eotattn.transport.problems import TransportProblem
from eotattn.transport.solution import TransportSolution
from eotattn.transport.solvers.recorded import repeat_while
from eotattn.transport.solvers.solver import Solver

__all__ = ["IterativeSolver", "Step", "temperatures"]

#: Takes a key potential and its residual; returns the next potential.
Step = Callable[[Tensor, MarginalResidual], Tensor]

#: The share of the mass that a converged solution may misplace at most: where rounding leaves more, none converges.
_LARGEST = 1e-3
#: Steps in which the error did not halve, after which it has come to the floor of rounding.
_STALLED = 4
#: Strides of plain iterations between two looks at the residual.
_STRIDES = 10
#: Warmer temperatures only guide the way, so they need no accuracy and little time.
_GUIDING_TOLERANCE = 1e-2
_GUIDING_ITERATIONS = 30
#: Steps after which a mask is tested for the first time, and machine epsilons of mass that its test may err by.
_FIRST_TEST = 8
_UNPLACEABLE = 64


def temperatures(problem: TransportProblem) -> list[float]:
    """Return the factors of epsilon to pass through: from a hundredth of the range of the scores, by tens, to one.

    Source: epsilon scaling, Schmitzer 2019.
    """
    steps = math.log10(max(1.0, problem.affinity.spread / (100 * problem.coldest)))
    return [10.0**level for level in range(math.floor(steps), -1, -1)]


@dataclass(frozen=True, kw_only=True)
class IterativeSolver(Solver):
    """A solver that repeats a step until the marginals are met.

    Args:
        tolerance: Bound for ``marginal_error``: the summed distance of the key mass from
            ``key_marginal exp(-key_potential / key_penalty)``, relative to the total mass. ``None`` is the floor of
            rounding, which follows from the sizes of the numbers that are met; where that is above 1e-3, nothing counts
            as converged.
        max_iterations: Steps a problem may take, all temperatures together.
    """

    tolerance: float | None = None
    max_iterations: int = 10_000

    #: Whether a step reads numbers back; one that does not is recorded and repeated on a GPU.
    asks_host: ClassVar[bool] = False
    #: Plain iterations between two checks, where the scaling form makes them cheaper than a look at the residual.
    stride: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            check_positive(self.name, "tolerance", self.tolerance)
        check_positive_int(self.name, "max_iterations", self.max_iterations)

    @abstractmethod
    def step(self, residuals: Residuals) -> Step:
        """Prepare the step at one temperature; it may remember earlier ones."""

    def run(self, problem: TransportProblem, start: Tensor | None) -> TransportSolution:
        """Iterate without gradients, on the detached problem, then attach them."""
        if problem.is_semi_relaxed:
            remedy = "Choose ClosedForm() or Auto()"
            fail(self.name, "problem", "have a key_marginal to iterate on", problem, remedy, error=NotImplementedError)
        start = None if start is None else _checked_start(problem, start)
        detached = problem.detached()  # anew in every call: the numbers may have changed in place since the last one
        with torch.no_grad(), full_precision(detached.query_marginal):
            level = self._last_level(detached, start)
        key_potential = attach_key_potential(problem, level.potential)
        response = respond(problem, key_potential)
        return TransportSolution(
            problem,
            query_potential=response.potential,
            key_potential=key_potential,
            num_iterations=level.count,
            converged=level.done & row_mass(problem, response).detach().isfinite().all(-1),
            solver=self.name,
            infeasible=level.infeasible,
        )

    def _last_level(self, problem: TransportProblem, start: Tensor | None) -> _Level:
        """Go down the temperatures until every problem of the batch has converged, is infeasible, or time is up.

        A problem that has converged is frozen, so each ends where it would have ended alone on the same temperatures.
        """
        potential = starting_potential(problem)
        schedule = temperatures(problem) if start is None else [1.0]
        if start is not None:
            potential = torch.where(potential.isfinite(), start, potential)
        count = torch.zeros(problem.batch_shape, dtype=torch.int64, device=potential.device)
        infeasible = torch.zeros_like(count, dtype=torch.bool)
        for factor in schedule:
            level = _Level(self, problem, factor, potential, count, infeasible)
            if self.asks_host or potential.device.type != "cuda":
                level.run()
            else:
                repeat_while(level.advance, level.running, hands_on=not problem.affinity.holds_pairs)
                level.look()  # what a graph computed lies in memory that the next graph may take
                level.test()
        return level


class _Level:
    """The iterations at one temperature; ``potential``, ``count`` and ``infeasible`` are changed in place."""

    def __init__(
        self,
        solver: IterativeSolver,
        problem: TransportProblem,
        factor: float,
        potential: Tensor,
        count: Tensor,
        infeasible: Tensor,
    ) -> None:
        final = factor == 1.0
        self.potential, self.count, self.infeasible = potential, count, infeasible
        self.done = torch.zeros_like(infeasible)
        self.best = torch.full(count.shape, math.inf, dtype=potential.dtype, device=count.device)
        self.age = torch.zeros_like(count)
        self.steps = 0
        self.running = torch.ones((), dtype=torch.bool, device=count.device)
        self.residuals = Residuals(problem, factor * problem.epsilon)
        self.step = solver.step(self.residuals)
        self.stride = 1 if self.residuals.scaling is None else solver.stride
        self.bound = solver.tolerance if final else max(solver.tolerance or 0.0, _GUIDING_TOLERANCE)
        limit = solver.max_iterations
        self.allowed = limit if final else (count + _GUIDING_ITERATIONS).clamp(max=limit)
        self.may_be_infeasible = problem.is_balanced and problem.affinity.forbids

    def look(self) -> Tensor:
        """Draw the residual, and return whether any problem goes on."""
        self.state = self.residuals(self.potential)
        if self.bound is not None:
            torch.le(self.state.error, self.bound, out=self.done)
            ended = self.done | self.infeasible
        else:
            ended = self._at_floor() | self.infeasible
        self.active = (self.count < self.allowed) > ended  # the first and not the second
        return torch.any(self.active.flatten(), dim=0, out=self.running)

    def _at_floor(self) -> Tensor:
        """Whether rounding leaves no less: where it may be reached and the error has stopped to halve, or for sure."""
        error = self.state.error
        least, most = self.residuals.rounding(self.potential, self.state)
        halved = error < 0.5 * self.best
        torch.where(halved, error, self.best, out=self.best)
        self.age.add_(1).masked_fill_(halved, 0)
        at_floor = (error <= least) | ((error <= most) & (self.age >= _STALLED))
        torch.logical_and(at_floor, most <= _LARGEST, out=self.done)
        return at_floor

    def move(self) -> None:
        """Take the step where a problem goes on."""
        following, count = self._stride() if self.stride > 1 else (self.step(self.potential, self.state), self.active)
        torch.where(self.active[..., None], following, self.potential, out=self.potential)
        self.count.add_(count)

    def _stride(self) -> tuple[Tensor, Tensor]:
        """The potential after many plain iterations and how many; after one where the dtype does not hold more."""
        scaling, marginal = self.residuals.scaling, self.residuals.problem.key_marginal
        assert scaling is not None
        assert marginal is not None
        most = self.stride if self.bound is None or self.may_be_infeasible else _STRIDES * self.stride
        left = torch.where(self.active, self.allowed - self.count, most).amin()
        bounds = min(most, int(left)), self.stride, -1.0 if self.bound is None else self.bound
        self.steps += bounds[0] - 1
        following, count, fine = scaling.iterated(self.potential, marginal, self.active, bounds)
        if not bool(fine.all()):
            self.stride //= 2  # the single step may bring the next ones within reach, or not
            following = torch.where(fine[..., None], following, self.step(self.potential, self.state))
            count = torch.where(fine, count, self.active)
        return following, count

    def advance(self) -> None:
        """Both; once nothing is running this changes nothing."""
        self.look()
        self.move()

    def run(self) -> None:
        """Advance until nothing goes on, and test the mask after 8, 16, 32, ... steps."""
        next_test = _FIRST_TEST
        while self.look():
            if self.steps >= next_test:
                self.test()
                next_test = 2 * self.steps
            self.move()
            self.steps += 1

    def test(self) -> None:
        """Mark the problems whose mask admits no coupling, as far as the potentials or their last change show it."""
        if not self.may_be_infeasible:
            return
        problem, digit = self.residuals.problem, torch.finfo(self.potential.dtype).eps
        for level in (self.potential, self.state.log_ratio.nan_to_num()):
            shown = unplaceable_mass(problem, level)
            self.infeasible |= (2 * shown > max(self.bound or 0.0, _UNPLACEABLE * digit)) & ~self.done


def _checked_start(problem: TransportProblem, start: Tensor) -> Tensor:
    """Raise unless ``start`` is a key potential of the problem; entries that carry nothing may be infinite."""
    owner = "solve"
    check_floating(owner, "start", start)
    shape = (*problem.batch_shape, problem.num_keys)
    remedy = "Pass the key_potential of a solution"
    fits = start.shape == shape or start.shape == shape[-1:]
    require(fits, owner, "start", f"have shape {tuple(shape)}", start, remedy)
    same = start.dtype == problem.affinity.dtype and start.device == problem.affinity.device
    rule = f"be {problem.affinity.dtype} on {problem.affinity.device}"
    require(same, owner, "start", rule, start, remedy, error=TypeError)
    fine = bool((start.isfinite() | ~starting_potential(problem).isfinite()).all())
    require(fine, owner, "start", "be finite on keys that carry mass", start, remedy)
    return start.detach()
