"""Problems with every kind of marginal, through the POT call that is right for each."""

# Legend: n queries, m keys. POT's traps that the calls below avoid (0.9.7, each shown by a test or by its source):
# a balanced `ot.solve` ignores the reference `c`; `reg_type="entropy"` replaces it by ones; the unbalanced value lacks
# mass terms; an empty row, or a column whose kernel underflows, silently returns the starting point.

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import ot
import torch
from torch import Tensor

from eotattn.transport.optimality.objective import primal_objective
from eotattn.transport.optimality.reduced import ReducedProblem, reduce_problem
from eotattn.transport.problems import TransportProblem
from eotattn.transport.solvers.iteration import temperatures

__all__ = ["LOG_CALL", "UNBALANCED_CALL", "PotSolution", "hard_marginals", "log_sinkhorn", "solve", "tensor_like"]

LOG_CALL = "ot.bregman.sinkhorn_log"
UNBALANCED_CALL = "ot.unbalanced.sinkhorn_unbalanced"


@dataclass(frozen=True, eq=False)
class PotSolution:
    """A coupling from POT.

    Args:
        coupling: Shape (..., n, m), on the dtype and device of the problem.
        value: The primal objective of that coupling with all mass terms, cost units, shape of the batch. It trusts
            hard marginals, and is computed here, because POT's own values leave terms out.
        call: The POT function that ran.

    Example:
        >>> solve(TransportProblem(torch.zeros(1, 2))).call
        'ot.unbalanced.sinkhorn_unbalanced'

    Source: POT, Flamary et al. 2021.
    """

    coupling: Tensor
    value: Tensor
    call: str


def solve(problem: TransportProblem, *, tolerance: float = 1e-15, max_iterations: int = 100_000) -> PotSolution:
    """Solve by the POT call that is right for the problem, one problem of a batch after the other, in float64.

    Two hard marginals go to ``ot.bregman.sinkhorn_log`` on ``-score - epsilon log R``, started from warmer
    temperatures; everything else to ``ot.unbalanced.sinkhorn_unbalanced`` with the reference given.

    Args:
        problem: The problem; gradients are not followed.
        tolerance: POT's ``stopThr``; in ``sinkhorn_log`` never below what rounding leaves, 1e-13 or one machine
            epsilon times the largest cost / epsilon.
        max_iterations: POT's ``numItermax``.

    Returns:
        The coupling, its value and the call.

    Raises:
        NotImplementedError: If POT's arithmetic, which is not logarithmic for soft marginals, cannot hold the problem.
        RuntimeError: If POT did not converge.

    Example:
        >>> solve(TransportProblem(torch.zeros(1, 2))).coupling
        tensor([[0.5000, 0.5000]])

    Source: POT, Flamary et al. 2021.
    """
    if problem.is_balanced:
        return _run(
            problem, lambda one: hard_marginals(one, reduce_problem(one), tolerance, max_iterations)[0], LOG_CALL
        )
    return _run(problem, lambda one: _soft(one, reduce_problem(one), tolerance, max_iterations), UNBALANCED_CALL)


def log_sinkhorn(
    cost: Tensor,
    query_marginal: Tensor,
    key_marginal: Tensor,
    *,
    epsilon: float,
    tolerance: float,
    max_iterations: int = 10_000,
) -> Tensor:
    """Run ``ot.bregman.sinkhorn_log`` on tensors as they are, from zero: what a benchmark times, not an oracle.

    Args:
        cost: Shape (n, m), cost units.
        query_marginal: Shape (n,), sums to one.
        key_marginal: Shape (m,), sums to one.
        epsilon: Temperature, cost units.
        tolerance: POT's ``stopThr``.
        max_iterations: POT's ``numItermax``.

    Returns:
        The key potential, cost units, shape (m,), free up to a constant, against the reference without marginals.

    Example:
        >>> half = torch.full((2,), 0.5)
        >>> log_sinkhorn(torch.zeros(2, 2), half, half, epsilon=1.0, tolerance=1e-6).diff()
        tensor([0.])

    Source: POT, Flamary et al. 2021.
    """
    options = {"stopThr": tolerance, "numItermax": max_iterations, "warn": False, "log": True}
    found: Tensor = ot.bregman.sinkhorn_log(query_marginal, key_marginal, cost, epsilon, **options)[1]["log_v"]
    return epsilon * found


def _run(problem: TransportProblem, solver: Callable[[TransportProblem], np.ndarray], call: str) -> PotSolution:
    """Solve the problems of a batch one by one."""
    problem = problem.dense()
    batch, (n, m) = problem.batch_shape, problem.affinity.shape[-2:]
    trailing = (n, m), (n, m), (n,), (m,)
    flat = [
        None if tensor is None else tensor.detach().expand(*batch, *sizes).reshape(-1, *sizes)
        for tensor, sizes in zip(problem.tensors, trailing, strict=True)
    ]
    numbers = {name: getattr(problem, name) for name in ("epsilon", "query_penalty", "key_penalty")}

    def alone(index: int) -> TransportProblem:
        own = {
            name: float(number.detach().expand(*batch, 1).reshape(-1)[index]) if isinstance(number, Tensor) else number
            for name, number in numbers.items()
        }
        return problem.with_tensors(*(None if tensor is None else tensor[index] for tensor in flat)).replaced(**own)

    plans = [tensor_like(problem, solver(alone(index))) for index in range(math.prod(batch))]
    coupling = torch.stack(plans).reshape(*batch, n, m)
    with torch.no_grad():
        value = primal_objective(problem, coupling)
    return PotSolution(coupling, value, call)


def hard_marginals(
    problem: TransportProblem, arrays: ReducedProblem, tolerance: float, max_iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Two hard marginals: the prior enters the cost, and warmer temperatures start the cooler ones."""
    forbidden = arrays.prior == 0
    log_prior = np.log(np.where(forbidden, 1.0, arrays.prior))
    tolerance = max(tolerance, 1e-13, np.finfo(float).eps * float(np.abs(arrays.cost).max()) / problem.coldest)
    start = None
    for epsilon in (factor * problem.coldest for factor in temperatures(problem)):
        cost = np.where(forbidden, math.inf, arrays.cost - epsilon * log_prior)
        final = epsilon == problem.coldest
        # Its log also holds the exponentials of the potentials, unused here, which may overflow.
        with np.errstate(over="ignore"):
            plan, log = ot.bregman.sinkhorn_log(
                arrays.query_marginal,
                arrays.key_marginal,
                cost,
                epsilon,
                numItermax=max_iterations if final else 200,
                stopThr=tolerance,
                warn=False,
                log=True,
                warmstart=start,
            )
        start = (4 * log["log_u"], 4 * log["log_v"])
    _require_converged(log["err"][-1], 10 * tolerance, LOG_CALL)
    return arrays.restore(plan), problem.coldest * log["log_v"]


def _soft(problem: TransportProblem, arrays: ReducedProblem, tolerance: float, max_iterations: int) -> np.ndarray:
    """A soft or absent marginal: the reference is an argument, and free keys are a penalty of zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        kernel = arrays.prior * np.exp(-arrays.cost / problem.epsilon)
    seen: np.ndarray = np.asarray(kernel.any(0))
    if not np.isfinite(kernel).all() or (problem.key_marginal is not None and not seen.all()):
        raise NotImplementedError(f"pot.solve: {UNBALANCED_CALL} cannot hold {problem}; its kernel leaves the doubles.")
    # A column that underflows would make POT stop at its starting point; its mass is below 1e-300.
    arrays = arrays.keep_columns(seen)
    demand = _shifted_marginal(problem, arrays)
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        warnings.filterwarnings("error", message="Numerical errors at iteration")
        try:
            plan, log = ot.unbalanced.sinkhorn_unbalanced(
                demand,
                arrays.key_marginal,
                arrays.cost,
                problem.epsilon,
                (problem.query_penalty, problem.key_penalty),
                c=arrays.query_marginal[:, None] * arrays.prior,
                numItermax=max_iterations,
                stopThr=tolerance,
                log=True,
            )
        except UserWarning as warning:
            raise NotImplementedError(f"pot.solve: {UNBALANCED_CALL} cannot hold {problem}; {warning}.") from warning
    _require_converged(log["err"][-1], tolerance, UNBALANCED_CALL)
    return arrays.restore(plan)


def _shifted_marginal(problem: TransportProblem, arrays: ReducedProblem) -> np.ndarray:
    """The query marginal that undoes the shift of the rows, which a finite penalty would otherwise feel."""
    if problem.query_penalty in (0.0, math.inf):
        return arrays.query_marginal
    exponent = arrays.lift / problem.query_penalty
    if exponent.max() > 600:
        raise NotImplementedError(f"pot.solve: {UNBALANCED_CALL} cannot hold {problem}; the optimal mass overflows.")
    return arrays.query_marginal * np.exp(exponent)


def _require_converged(error: float, tolerance: float, call: str) -> None:
    """Raise unless POT met its tolerance."""
    if not error <= tolerance:
        raise RuntimeError(f"pot: {call} must converge; got an error of {error:.1e}. Raise max_iterations or epsilon.")


def tensor_like(problem: TransportProblem, array: np.ndarray) -> Tensor:
    """A tensor like the score."""
    return torch.as_tensor(array, dtype=problem.affinity.dtype, device=problem.affinity.device)
