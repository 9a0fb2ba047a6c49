"""The door: choose a solver, run it on detached tensors, attach the exact gradients."""

from __future__ import annotations

import torch

from eotattn.checks import check_choice, check_positive, check_positive_int, require
from eotattn.transport.closed_form import solve_closed_form
from eotattn.transport.implicit import attach_key_potential
from eotattn.transport.iteration import Step, default_tolerance, iterate
from eotattn.transport.newton import newton_step
from eotattn.transport.problem import TransportProblem
from eotattn.transport.response import respond
from eotattn.transport.sinkhorn import sinkhorn_step
from eotattn.transport.solution import TransportSolution

__all__ = ["METHODS", "solve"]

#: What ``solve`` accepts as ``method``.
METHODS = ("auto", "closed_form", "newton", "sinkhorn")

_OWNER = "solve"
#: The default number of iterations, and the most keys for which ``"auto"`` factorises a keys-by-keys matrix.
_MAX_ITERATIONS = {"newton": 200, "sinkhorn": 10_000}
_NEWTON_KEYS = 1024
_STEPS: dict[str, Step] = {"newton": newton_step, "sinkhorn": sinkhorn_step}


def solve(
    problem: TransportProblem,
    *,
    method: str = "auto",
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> TransportSolution:
    """Solve a transport problem; a batch is solved as if each problem stood alone.

    Gradients: ``primal`` and ``dual`` follow the envelope theorem; potentials, coupling and attention weights follow
    implicit differentiation of the optimality conditions (no unrolling), and may be differentiated twice. Both are
    those of the exact optimum, so they are only as good as the convergence. The closed form is plain autograd.

    Args:
        problem: The problem.
        method: ``"closed_form"`` for free keys; ``"sinkhorn"``, cheap steps and no memory beyond the scores;
            ``"newton"``, few steps, each with a dense solve of the size of the keys, for small epsilon; or
            ``"auto"``: the closed form for free keys, else Newton up to 1024 keys, else Sinkhorn. The solution's
            ``method`` says which one ran.
        tolerance: Bound for ``marginal_error``: the summed distance of the key mass from
            ``key_marginal exp(-key_potential / key_penalty)``, relative to the total mass. ``None`` is the floor of
            rounding, 128 machine epsilons times max(1, max |score| / epsilon). No meaning for the closed form.
        max_iterations: Steps a problem may take; ``None`` is 200 for Newton and 10 000 for Sinkhorn.

    Returns:
        The solution; its ``converged`` says whether the tolerance was met. Gauge of balanced problems:
        ``sum key_marginal * key_potential = 0``.

    Raises:
        TypeError: If ``problem`` is not a problem, or a number is not a number.
        ValueError: If an argument is out of range or would have no effect.
        NotImplementedError: If the method cannot solve the problem.

    Example:
        >>> problem = TransportProblem(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), key_marginal=torch.tensor([0.5, 0.5]))
        >>> solve(problem).coupling.sum(0)
        tensor([0.5000, 0.5000])

    Source: Litman 2025, arXiv 2508.08369; Chizat et al. 2018; Sander et al. 2022.
    """
    is_problem = isinstance(problem, TransportProblem)
    remedy = "State it with TransportProblem(score, ...)"
    require(is_problem, _OWNER, "problem", "be a TransportProblem", type(problem), remedy, error=TypeError)
    check_choice(_OWNER, "method", method, METHODS)
    method = _choose(problem) if method == "auto" else method
    if method == "closed_form":
        for name, value in (("tolerance", tolerance), ("max_iterations", max_iterations)):
            rule, remedy = "be left out where the closed form applies", "It needs no iteration"
            require(value is None, _OWNER, name, rule, value, remedy)
        return solve_closed_form(problem)
    if problem.key_marginal is None:
        raise NotImplementedError(
            f"solve: method {method!r} iterates on a key_marginal and cannot solve a problem with free keys; "
            f"got {problem}. Choose method='closed_form' or 'auto'."
        )
    bound = default_tolerance(problem) if tolerance is None else check_positive(_OWNER, "tolerance", tolerance)
    limit = _MAX_ITERATIONS[method] if max_iterations is None else max_iterations
    return _iterative(problem, method, bound, check_positive_int(_OWNER, "max_iterations", limit))


def _choose(problem: TransportProblem) -> str:
    """The method that ``"auto"`` stands for."""
    if problem.key_marginal is None:
        return "closed_form"
    return "newton" if problem.num_keys <= _NEWTON_KEYS else "sinkhorn"


def _iterative(problem: TransportProblem, method: str, tolerance: float, max_iterations: int) -> TransportSolution:
    """Iterate without gradients, then attach them."""
    detached = problem.with_tensors(*(None if x is None else x.detach() for x in problem.tensors))  # type: ignore[arg-type]
    with torch.no_grad():
        raw, num_iterations, converged = iterate(detached, _STEPS[method], tolerance, max_iterations)
    key_potential = attach_key_potential(problem, raw)
    query_potential = respond(problem, key_potential).potential
    return TransportSolution(
        problem,
        query_potential=query_potential,
        key_potential=key_potential,
        num_iterations=num_iterations,
        converged=converged,
        method=method,
    )
