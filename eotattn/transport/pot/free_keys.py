"""Free keys through POT calls that share nothing with the closed form."""

# Legend: n queries, m keys.

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import ot
from torch import Tensor

from eotattn.transport.optimality.reduced import reduce_problem
from eotattn.transport.pot.solvers import hard_marginals, tensor_like
from eotattn.transport.problems import TransportProblem

__all__ = ["fixed_key_marginal", "majorization", "quasi_newton"]


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
        >>> import torch
        >>> problem = TransportProblem(torch.zeros(1, 2))
        >>> fixed_key_marginal(problem, torch.tensor([0.5, 0.5]))[0]
        tensor([[0.5000, 0.5000]])

    Source: on POT's ``sinkhorn_log``.
    """
    _require_free(problem, "ot.bregman.sinkhorn_log", finite=False)
    arrays = reduce_problem(problem, key_marginal)
    coupling, potential = hard_marginals(problem, arrays, 1e-13, 100_000)
    full = np.full(problem.num_keys, math.nan)
    full[arrays.columns] = potential
    return tensor_like(problem, coupling), tensor_like(problem, full)


def majorization(problem: TransportProblem, *, max_iterations: int = 20_000) -> Tensor:
    """Solve a free-key problem with a finite query penalty by POT's multiplicative ``mm_unbalanced``.

    Args:
        problem: One problem (no batch) with free keys and a finite query penalty.
        max_iterations: POT's ``numItermax``.

    Returns:
        The coupling, shape (n, m).

    Raises:
        NotImplementedError: If the problem is of another kind.

    Example:
        >>> import torch
        >>> problem = TransportProblem(torch.zeros(1, 2), query_penalty=1.0)
        >>> majorization(problem)
        tensor([[0.7071, 0.7071]])

    Source: POT; Chapel et al. 2021.
    """
    _require_free(problem, "ot.unbalanced.mm_unbalanced", finite=True)
    return tensor_like(problem, _general(problem, ot.unbalanced.mm_unbalanced, max_iterations, {"div": "kl"}))


def quasi_newton(problem: TransportProblem, *, max_iterations: int = 2_000) -> Tensor:
    """Solve a free-key problem with a finite query penalty by POT's generic ``lbfgsb_unbalanced``; about 1e-6 accurate.

    Args:
        problem: One problem (no batch) with free keys and a finite query penalty.
        max_iterations: POT's ``numItermax``.

    Returns:
        The coupling, shape (n, m).

    Raises:
        NotImplementedError: If the problem is of another kind, or forbids pairs.

    Example:
        >>> import torch
        >>> problem = TransportProblem(torch.zeros(1, 2), query_penalty=1.0)
        >>> quasi_newton(problem)
        tensor([[0.7071, 0.7071]])

    Source: POT; Blondel et al. 2018.
    """
    _require_free(problem, "ot.unbalanced.lbfgsb_unbalanced", finite=True)
    log_prior = problem.log_prior
    if log_prior is not None and bool((log_prior == -math.inf).any()):
        raise NotImplementedError(f"pot: ot.unbalanced.lbfgsb_unbalanced fails on forbidden pairs; got {problem}.")
    kinds = {"reg_div": "kl", "regm_div": "kl"}
    return tensor_like(problem, _general(problem, ot.unbalanced.lbfgsb_unbalanced, max_iterations, kinds))


def _general(
    problem: TransportProblem, function: Callable[..., np.ndarray], max_iterations: int, kinds: dict[str, str]
) -> np.ndarray:
    """Free keys and a finite query penalty, by one of POT's solvers that work on the coupling itself."""
    arrays = reduce_problem(problem)
    reference = arrays.query_marginal[:, None] * arrays.prior
    cost = arrays.cost - arrays.lift[:, None]
    # The lift restores the problem itself, so that nothing of the shift is shared with what is tested.
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # POT hands SciPy an option that SciPy is about to drop.
        warnings.filterwarnings("ignore", message=".*`disp` and `iprint`", category=DeprecationWarning)
        plan = function(
            arrays.query_marginal,
            arrays.key_marginal,
            cost,
            reg=problem.epsilon,
            reg_m=(problem.query_penalty, 0.0),
            c=reference,
            G0=reference,
            numItermax=max_iterations,
            stopThr=1e-16,
            **kinds,
        )
    return arrays.restore(plan)


def _require_free(problem: TransportProblem, call: str, *, finite: bool) -> None:
    """Raise unless the problem is single, with free keys and a query penalty of the right kind."""
    fits = problem.key_marginal is None and not problem.batch_shape
    kind = "a finite positive" if finite else "an infinite"
    if not (fits and (0 < problem.query_penalty < math.inf if finite else math.isinf(problem.query_penalty))):
        raise NotImplementedError(
            f"pot: {call} as an oracle serves one problem with free keys and {kind} query_penalty; got {problem}."
        )
