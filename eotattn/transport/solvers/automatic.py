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
from eotattn.transport.solvers.newton import Newton
from eotattn.transport.solvers.solver import Solver

__all__ = ["Auto"]

#: Keys cubed, over the batch, up to which Newton's method is as fast from the start.
_NEWTON_WORK = 2**18
#: Steps of Anderson after which Newton takes over what has not converged.
_PATIENCE = 300


@dataclass(frozen=True, kw_only=True)
class Auto(Solver):
    """The closed form for semi-relaxed problems, Newton for small dense ones, and else Anderson with Newton behind it.

    Anderson's steps are cheap and few at moderate epsilon; what has not converged after 300 of them, as at small
    epsilon, goes on by Newton from where it is.

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
        own = Newton(tolerance=self.tolerance)
        limit = _PATIENCE + own.max_iterations if self.max_iterations is None else self.max_iterations
        if problem.affinity.holds_pairs and math.prod(problem.batch_shape) * problem.num_keys**3 <= _NEWTON_WORK:
            return replace(own, max_iterations=min(limit, own.max_iterations)).run(problem, start)
        first = Anderson(tolerance=self.tolerance, max_iterations=min(limit, _PATIENCE)).run(problem, start)
        left = limit - _PATIENCE
        ended = first.converged if first.infeasible is None else first.converged | first.infeasible
        if left <= 0 or bool(ended.all()):
            return first
        second = replace(own, max_iterations=left).run(problem, first.key_potential.detach())
        count = first.num_iterations + second.num_iterations
        return replace(second, num_iterations=count, solver=f"{first.solver}, {second.solver}")
