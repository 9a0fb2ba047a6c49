"""The same problems through POT, the independent oracle. The only file that imports it."""

# Legend: n queries, m keys; n' and m' those that carry mass.
# POT's traps that the calls below avoid (0.9.7, each shown by a test or by its source): a balanced `ot.solve` ignores
# the reference `c`; `reg_type="entropy"` replaces it by ones; the unbalanced value lacks mass terms; an empty row, or a
# column whose kernel underflows, silently returns the starting point.

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
from eotattn.transport.problems import TransportProblem
from eotattn.transport.solvers.iteration import temperatures

__all__ = ["PotSolution", "fixed_key_marginal", "log_sinkhorn", "plain_sinkhorn", "solve"]

_LOG_CALL = "ot.bregman.sinkhorn_log"
_UNBALANCED_CALL = "ot.unbalanced.sinkhorn_unbalanced"


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
        return _run(problem, lambda one: _hard(one, _reduced(one), tolerance, max_iterations)[0], _LOG_CALL)
    return _run(problem, lambda one: _soft(one, _reduced(one), tolerance, max_iterations), _UNBALANCED_CALL)


def fixed_key_marginal(problem: TransportProblem, key_marginal: Tensor) -> tuple[Tensor, Tensor]:
    """Solve a free-key problem with its key marginal fixed: an oracle that shares nothing with the closed form.

    At the key marginal of the free optimum the constraint is idle, so the key potential must be constant.

    Args:
        problem: One problem (no batch) with free keys and an infinite query penalty.
        key_marginal: Shape (m,), e.g. the column sums of the coupling to be tested.

    Returns:
        ``(coupling, key_potential)``, shapes (n, m) and (m,), cost units; the potential is NaN on keys without mass.

    Raises:
        NotImplementedError: If the problem is a batch, has a key marginal, or a finite query penalty.

    Example:
        >>> fixed_key_marginal(TransportProblem(torch.zeros(1, 2)), torch.tensor([0.5, 0.5]))[0]
        tensor([[0.5000, 0.5000]])
    """
    if problem.batch_shape or problem.key_marginal is not None or not math.isinf(problem.query_penalty):
        rule = "serves one problem with free keys and an infinite query_penalty"
        raise NotImplementedError(f"pot: {_LOG_CALL} as an oracle {rule}; got {problem}.")
    arrays = _reduced(problem, key_marginal)
    coupling, potential = _hard(problem, arrays, 1e-13, 100_000)
    full = np.full(problem.num_keys, math.nan)
    full[arrays.columns] = potential
    return _tensor_like(problem, coupling), _tensor_like(problem, full)


def log_sinkhorn(cost: Tensor, *marginals: Tensor, epsilon: float, tolerance: float) -> Tensor:
    """``ot.bregman.sinkhorn_log`` on tensors as they are, from zero, for benchmarks: the key potential, cost units."""
    options = {"stopThr": tolerance, "numItermax": 10_000, "warn": False, "log": True}
    found: Tensor = ot.bregman.sinkhorn_log(*marginals, cost, epsilon, **options)[1]["log_v"]
    return epsilon * found


def plain_sinkhorn(cost: Tensor, *marginals: Tensor, epsilon: float, tolerance: float) -> Tensor:
    """POT's fastest iteration, without logs, for benchmarks: the plan (n, m), or (B, n, m) of a batch in one call."""
    if cost.dim() == 3:
        options = {"method": "sinkhorn", "reg_type": "entropy", "grad": "detach", "tol": tolerance, "max_iter": 10_000}
        plans: Tensor = ot.batch.solve_batch(cost, epsilon, *marginals, **options).plan
        return plans
    plan: Tensor = ot.sinkhorn(*marginals, cost, epsilon, stopThr=tolerance, numItermax=10_000, warn=False)
    return plan


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

    plans = [_tensor_like(problem, solver(alone(index))) for index in range(math.prod(batch))]
    coupling = torch.stack(plans).reshape(*batch, n, m)
    with torch.no_grad():
        value = primal_objective(problem, coupling)
    return PotSolution(coupling, value, call)


def _hard(
    problem: TransportProblem, arrays: _Arrays, tolerance: float, max_iterations: int
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
    _require_converged(log["err"][-1], 10 * tolerance, _LOG_CALL)
    return arrays.restore(plan), problem.coldest * log["log_v"]


def _soft(problem: TransportProblem, arrays: _Arrays, tolerance: float, max_iterations: int) -> np.ndarray:
    """A soft or absent marginal: the reference is an argument, and free keys are a penalty of zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        kernel = arrays.prior * np.exp(-arrays.cost / problem.epsilon)
    seen: np.ndarray = np.asarray(kernel.any(0))
    if not np.isfinite(kernel).all() or (problem.key_marginal is not None and not seen.all()):
        raise NotImplementedError(
            f"pot.solve: {_UNBALANCED_CALL} cannot hold {problem}; its kernel leaves the doubles."
        )
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
            raise NotImplementedError(f"pot.solve: {_UNBALANCED_CALL} cannot hold {problem}; {warning}.") from warning
    _require_converged(log["err"][-1], tolerance, _UNBALANCED_CALL)
    return arrays.restore(plan)


def _shifted_marginal(problem: TransportProblem, arrays: _Arrays) -> np.ndarray:
    """The query marginal that undoes the shift of the rows, which a finite penalty would otherwise feel."""
    if problem.query_penalty in (0.0, math.inf):
        return arrays.query_marginal
    exponent = arrays.lift / problem.query_penalty
    if exponent.max() > 600:
        raise NotImplementedError(f"pot.solve: {_UNBALANCED_CALL} cannot hold {problem}; the optimal mass overflows.")
    return arrays.query_marginal * np.exp(exponent)


def _require_converged(error: float, tolerance: float, call: str) -> None:
    """Raise unless POT met its tolerance."""
    if not error <= tolerance:
        raise RuntimeError(f"pot: {call} must converge; got an error of {error:.1e}. Raise max_iterations or epsilon.")


def _tensor_like(problem: TransportProblem, array: np.ndarray) -> Tensor:
    """A tensor like the score."""
    return torch.as_tensor(array, dtype=problem.affinity.dtype, device=problem.affinity.device)


@dataclass(frozen=True, eq=False)
class _Arrays:
    """One problem in float64, reduced to what carries mass and shifted to where doubles are accurate."""

    cost: np.ndarray  # cost units, (n', m'): zero at the peak of each row, and on forbidden pairs
    prior: np.ndarray  # (n', m'): one at the peak of each row, zero on forbidden pairs
    lift: np.ndarray  # what the shift took from score + epsilon * log_prior, cost units, (n',)
    rows: np.ndarray  # which queries remain, (n,)
    columns: np.ndarray  # which keys remain, (m,)
    query_marginal: np.ndarray  # (n',), positive
    key_marginal: np.ndarray  # (m',), positive; ones for free keys

    def restore(self, plan: np.ndarray) -> np.ndarray:
        """Return the plan with zeros where rows and columns were dropped, shape (n, m)."""
        full = np.zeros((self.rows.size, self.columns.size))
        full[np.ix_(self.rows, self.columns)] = plan
        return full

    def keep_columns(self, kept: np.ndarray) -> _Arrays:
        """Return the problem with some of the remaining keys dropped; ``kept`` are booleans of shape (m',)."""
        columns = self.columns.copy()
        columns[columns] = kept
        cost, prior, key_marginal = self.cost[:, kept], self.prior[:, kept], self.key_marginal[kept]
        return _Arrays(cost, prior, self.lift, self.rows, columns, self.query_marginal, key_marginal)


def _reduced(problem: TransportProblem, key_marginal: Tensor | None = None) -> _Arrays:
    """Drop what carries nothing, and shift the peak of every row to cost zero and prior one.

    The shift changes no attention weights. Where a query penalty is zero it would change the mass, and is left out.
    """
    if problem.regulariser is not None:
        raise NotImplementedError(f"pot: no call of POT serves this regulariser around a prior; got {problem}.")
    score, log_prior, query, key = (None if x is None else x.detach().cpu().double().numpy() for x in problem.tensors)
    key = key if key_marginal is None else key_marginal.detach().cpu().double().numpy()
    assert score is not None
    assert query is not None
    nats = np.zeros_like(score) if log_prior is None else log_prior
    rows = query > 0
    columns = np.isfinite(nats[rows]).any(0) & (True if key is None else key > 0)
    score, nats, query = score[rows][:, columns], nats[rows][:, columns], query[rows]
    key = np.ones(score.shape[1]) if key is None else key[columns]
    lift = np.zeros(len(query))
    if problem.query_penalty > 0:
        peak = (score / problem.epsilon + nats).argmax(1)[:, None]
        top, top_nats = np.take_along_axis(score, peak, 1), np.take_along_axis(nats, peak, 1)
        score, nats, lift = score - top, nats - top_nats, (top + problem.epsilon * top_nats)[:, 0]
    cost = np.where(np.isfinite(nats), 0.0 - score, 0.0)
    return _Arrays(cost, np.exp(nats), lift, rows, columns, query, key)
