"""The door: one function, one problem, one solver."""

from __future__ import annotations

from torch import Tensor

from eotattn.checks import check_choice, require
from eotattn.transport.problems import TransportProblem
from eotattn.transport.solution import TransportSolution
from eotattn.transport.solvers.anderson import Anderson
from eotattn.transport.solvers.automatic import Auto
from eotattn.transport.solvers.closed_form import ClosedForm
from eotattn.transport.solvers.newton import Newton
from eotattn.transport.solvers.sinkhorn import Sinkhorn
from eotattn.transport.solvers.solver import Solver

__all__ = ["SOLVERS", "solve"]

#: What ``solve`` accepts as a name, and the solver that it stands for.
SOLVERS: dict[str, Solver] = {
    "auto": Auto(),
    "anderson": Anderson(),
    "closed_form": ClosedForm(),
    "newton": Newton(),
    "sinkhorn": Sinkhorn(),
}


def solve(
    problem: TransportProblem, solver: Solver | str = "auto", *, start: Tensor | None = None
) -> TransportSolution:
    """Solve a transport problem; a batch is solved as if each problem stood alone.

    Gradients: ``primal`` and ``dual`` follow the envelope theorem; potentials, coupling and attention weights follow
    implicit differentiation of the optimality conditions (no unrolling), and may be differentiated twice. Both are
    those of the exact optimum, so they are only as good as the convergence. The closed form is plain autograd.

    Args:
        problem: The problem.
        solver: ``ClosedForm()``, ``Newton(...)``, ``Anderson(...)``, ``Sinkhorn(...)`` or ``Auto(...)``; or the name of
            one for its defaults, e.g. ``"newton"``. The solution's ``solver`` says which one ran. On a factored
            problem every solver answers by fused calls and forms no n x m numbers.
        start: Key potential to start from, e.g. that of a solution nearby, shape (..., m), cost units; warmer
            temperatures are then skipped. No meaning for the closed form.

    Returns:
        The solution; its ``status`` says whether the tolerance was met. Gauge of balanced problems:
        ``sum key_marginal * key_potential = 0``.

    Raises:
        TypeError: If ``problem`` is not a problem, or ``solver`` no solver.
        ValueError: If an argument is out of range or would have no effect.
        NotImplementedError: If the solver cannot solve the problem.

    Example:
        >>> import torch
        >>> problem = TransportProblem(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), key_marginal=torch.tensor([0.5, 0.5]))
        >>> solve(problem, solver="newton").coupling.sum(0)
        tensor([0.5000, 0.5000])

    Source: Litman 2025, arXiv 2508.08369; Chizat et al. 2018; Sander et al. 2022.
    """
    is_problem = isinstance(problem, TransportProblem)
    remedy = "State it with TransportProblem(score, ...)"
    require(is_problem, "solve", "problem", "be a TransportProblem", type(problem), remedy, error=TypeError)
    if isinstance(solver, str):
        solver = SOLVERS[check_choice("solve", "solver", solver, tuple(SOLVERS))]
    remedy = "Pass e.g. Newton(tolerance=1e-9), or a name"
    require(isinstance(solver, Solver), "solve", "solver", "be a Solver", type(solver), remedy, error=TypeError)
    return solver.run(problem, start)
