"""The door: choose a solver, run it on detached tensors, attach the exact gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.checks import check_choice, check_floating, check_positive, check_positive_int, require
from eotattn.transport.arithmetic import full_precision
from eotattn.transport.closed_form import solve_closed_form
from eotattn.transport.optimality.implicit import attach_key_potential
from eotattn.transport.optimality.keys import starting_potential
from eotattn.transport.optimality.response import respond, row_mass
from eotattn.transport.problems import TransportProblem
from eotattn.transport.solution import TransportSolution
from eotattn.transport.solvers.accelerated import AcceleratedStep
from eotattn.transport.solvers.iteration import Step, default_tolerance, iterate
from eotattn.transport.solvers.newton import newton_step
from eotattn.transport.solvers.sinkhorn import sinkhorn_step

__all__ = ["METHODS", "solve"]

#: What ``solve`` accepts as ``method``.
METHODS = ("auto", "closed_form", "newton", "sinkhorn", "streaming")

_OWNER = "solve"
#: The most keys for which ``"auto"`` factorises a keys-by-keys matrix.
_NEWTON_KEYS = 1024


@dataclass(frozen=True)
class _Iterative:
    """What makes a step, which may remember earlier ones; how many by default; whether it reads numbers back."""

    make_step: Callable[[], Step]
    max_iterations: int = 10_000
    asks_host: bool = False


_ITERATIVE = {
    "newton": _Iterative(lambda: newton_step, max_iterations=200, asks_host=True),
    "sinkhorn": _Iterative(lambda: sinkhorn_step),
    "streaming": _Iterative(AcceleratedStep),
}


def solve(
    problem: TransportProblem,
    *,
    method: str = "auto",
    tolerance: float | None = None,
    max_iterations: int | None = None,
    start: Tensor | None = None,
) -> TransportSolution:
    """Solve a transport problem; a batch is solved as if each problem stood alone.

    Gradients: ``primal`` and ``dual`` follow the envelope theorem; potentials, coupling and attention weights follow
    implicit differentiation of the optimality conditions (no unrolling), and may be differentiated twice. Both are
    those of the exact optimum, so they are only as good as the convergence. The closed form is plain autograd.

    Args:
        problem: The problem.
        method: ``"closed_form"`` for free keys; ``"sinkhorn"``, the plain iteration; ``"streaming"``, the same
            iteration extrapolated from its last steps, in O(n + m) memory beyond the problem's;
            ``"newton"``, few steps, each with a linear system of the size of the keys, for small epsilon; or
            ``"auto"``: the closed form for free keys; else, where the scores are dense, Newton up to 1024 keys and
            streaming beyond; else streaming. The solution's ``method`` says which one ran. On a factored problem
            every method answers by fused calls and forms no n x m numbers.
        tolerance: Bound for ``marginal_error``: the summed distance of the key mass from
            ``key_marginal exp(-key_potential / key_penalty)``, relative to the total mass. ``None`` is the floor of
            rounding, 128 machine epsilons times max(1, max |score| / epsilon), or 1e-3 if that is less. No meaning for
            the closed form.
        max_iterations: Steps a problem may take; ``None`` is 200 for Newton and 10 000 otherwise.
        start: Key potential to start from, e.g. that of a solution nearby, shape (..., m), cost units; warmer
            temperatures are then skipped. No meaning for the closed form.

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
        for name, value in (("tolerance", tolerance), ("max_iterations", max_iterations), ("start", start)):
            rule, remedy = "be left out where the closed form applies", "It needs no iteration"
            require(value is None, _OWNER, name, rule, value, remedy)
        return solve_closed_form(problem)
    if problem.key_marginal is None:
        raise NotImplementedError(
            f"solve: method {method!r} iterates on a key_marginal and cannot solve a problem with free keys; "
            f"got {problem}. Choose method='closed_form' or 'auto'."
        )
    detached = problem.detached()  # anew in every call: the numbers may have changed in place since the last one
    bound = default_tolerance(detached) if tolerance is None else check_positive(_OWNER, "tolerance", tolerance)
    limit = _ITERATIVE[method].max_iterations if max_iterations is None else max_iterations
    limit = check_positive_int(_OWNER, "max_iterations", limit)
    start = None if start is None else _checked_start(problem, start)
    return _iterative(problem, detached, method, tolerance=bound, max_iterations=limit, start=start)


def _choose(problem: TransportProblem) -> str:
    """The method that ``"auto"`` stands for."""
    if problem.key_marginal is None:
        return "closed_form"
    return "newton" if problem.affinity.holds_pairs and problem.num_keys <= _NEWTON_KEYS else "streaming"


def _checked_start(problem: TransportProblem, start: Tensor) -> Tensor:
    """Raise unless ``start`` is a key potential of the problem; entries that carry nothing may be infinite."""
    check_floating(_OWNER, "start", start)
    assert problem.key_marginal is not None
    shape = (*problem.batch_shape, problem.num_keys)
    remedy = "Pass the key_potential of a solution"
    fits = start.shape == shape or start.shape == shape[-1:]
    require(fits, _OWNER, "start", f"have shape {tuple(shape)}", start, remedy)
    same = start.dtype == problem.affinity.dtype and start.device == problem.affinity.device
    rule = f"be {problem.affinity.dtype} on {problem.affinity.device}"
    require(same, _OWNER, "start", rule, start, remedy, error=TypeError)
    carries = starting_potential(problem).isfinite()
    fine = bool((start.isfinite() | ~carries).all())
    require(fine, _OWNER, "start", "be finite on keys that carry mass", start, remedy)
    return start.detach()


def _iterative(
    problem: TransportProblem,
    detached: TransportProblem,
    method: str,
    *,
    tolerance: float,
    max_iterations: int,
    start: Tensor | None,
) -> TransportSolution:
    """Iterate without gradients, on the detached problem, then attach them."""
    how = _ITERATIVE[method]
    with torch.no_grad(), full_precision(detached.query_marginal):
        raw, num_iterations, converged = iterate(
            detached, how.make_step(), tolerance, max_iterations, start=start, asks_host=how.asks_host
        )
    key_potential = attach_key_potential(problem, raw)
    response = respond(problem, key_potential)
    return TransportSolution(
        problem,
        query_potential=response.potential,
        key_potential=key_potential,
        num_iterations=num_iterations,
        converged=converged & row_mass(problem, response).detach().isfinite().all(-1),
        method=method,
    )
