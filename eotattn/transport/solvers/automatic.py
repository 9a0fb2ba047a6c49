"""The choice of a solver, by kind, size and temperature of a problem."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from eotattn.checks import check_positive, check_positive_int, fail
from eotattn.transport.problems import TransportProblem
from eotattn.transport.solution import TransportSolution
from eotattn.transport.solvers.anderson import Anderson
from eotattn.transport.solvers.closed_form import ClosedForm
from eotattn.transport.solvers.iteration import IterativeSolver
from eotattn.transport.solvers.newton import Newton
from eotattn.transport.solvers.sinkhorn import Sinkhorn
from eotattn.transport.solvers.solver import Solver

__all__ = ["Auto"]

#: Range of the scores over epsilon, and pairs over the batch, up to which plain iterations come first, and how many.
_MILD = 100
_FEW_PAIRS = 2**18
_PLAIN = 100
#: Keys cubed, over the batch, up to which Newton's method is faster than Anderson's.
_NEWTON_WORK = 2**18
#: Steps of Anderson after which Newton takes over.
_PATIENCE = 300


@dataclass(frozen=True, kw_only=True)
class Auto(Solver):
    """The closed form for semi-relaxed problems; else methods in turn, each for what the one before has not finished.

    Plain iterations in scaling form cost a tenth of any other step, so small dense balanced problems at moderate
    epsilon (a hundredth of the range of the scores or more) begin with a hundred of them. Then Newton takes small dense
    problems, and Anderson, with Newton behind it, all others: its steps are few unless epsilon is small.

    Args:
        tolerance: See ``IterativeSolver``; no meaning for the closed form.
        max_iterations: Of all steps together; ``None`` is the solvers' own limits. No meaning for the closed form.

    Example:
        >>> import torch
        >>> Auto().run(TransportProblem(torch.zeros(1, 2)), None).solver
        'ClosedForm'
    """

    tolerance: float | None = None
    max_iterations: int | None = None

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            check_positive(self.name, "tolerance", self.tolerance)
        if self.max_iterations is not None:
            check_positive_int(self.name, "max_iterations", self.max_iterations)

    def run(self, problem: TransportProblem, start: Tensor | None) -> TransportSolution:
        """See ``Solver``."""
        if problem.is_semi_relaxed:
            for name in ("tolerance", "max_iterations"):
                value = getattr(self, name)
                if value is not None:
                    rule = "be left out where the closed form applies"
                    fail(self.name, name, rule, value, "It needs no iteration")
            return ClosedForm().run(problem, start)
        left = self.max_iterations
        solution: TransportSolution | None = None
        for solver in self._solvers(problem):
            own = replace(
                solver, max_iterations=solver.max_iterations if left is None else min(left, solver.max_iterations)
            )
            following = own.run(problem, start)
            if solution is not None:
                count = solution.num_iterations + following.num_iterations
                following = replace(following, num_iterations=count, solver=f"{solution.solver}, {following.solver}")
            solution, start = following, following.key_potential.detach()
            left = None if left is None else left - own.max_iterations
            ended = following.converged if following.infeasible is None else following.converged | following.infeasible
            if left == 0 or bool(ended.all()):
                break
        assert solution is not None
        return solution

    def _solvers(self, problem: TransportProblem) -> list[IterativeSolver]:
        """The one place that says which methods serve a problem."""
        count, dense = math.prod(problem.batch_shape), problem.affinity.holds_pairs
        newton, size = Newton(tolerance=self.tolerance), problem.num_queries * problem.num_keys
        on_host = dense and problem.affinity.device.type != "cuda"
        is_small = on_host and problem.is_balanced and count * size <= _FEW_PAIRS
        solvers: list[IterativeSolver] = []
        if is_small and problem.affinity.spread <= _MILD * problem.coldest:
            solvers.append(Sinkhorn(tolerance=self.tolerance, max_iterations=_PLAIN))
        if not dense or count * problem.num_keys**3 > _NEWTON_WORK:
            solvers.append(Anderson(tolerance=self.tolerance, max_iterations=_PATIENCE))
        return [*solvers, newton]
