"""What is proved about a solution, or about any attention matrix, as a table."""

# Legend: n queries, m keys; the leading dimensions are a batch.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_no_nan, require
from eotattn.transport.certificates.duality_gap import DualityGap
from eotattn.transport.optimality.objective import divergence, dual_objective, slopes
from eotattn.transport.optimality.response import respond
from eotattn.transport.problems import TransportProblem, Tsallis
from eotattn.transport.problems.thresholds import TsallisAffinity

__all__ = ["Certificate", "certify", "solution_certificate"]

_OWNER = "certify"


@dataclass(frozen=True, eq=False)
class Certificate:
    """Numbers that bound the error of a coupling, each of the shape of the batch; prints the worst as a table.

    The dual is computed in float64 from the inputs as given, whatever kernel found the potentials; the gap as a sum of
    terms that cannot be negative, for a feasible coupling near the one in question; ``distance`` adds the way there.

    Args:
        primal: Objective of the feasible coupling, cost units; never below the optimum.
        dual: Objective of potentials, cost units; never above the optimum.
        gap: Primal less dual, cost units; +inf where nothing feasible is at hand.
        query_error: Summed distance of row masses from their target, relative to the total mass.
        key_error: The same for columns; zero for free keys.
        distance: Bound for the summed distance of the coupling in question from the optimum, relative to the total
            mass; by Pinsker's inequality.
        iterations: Whole numbers.
        converged: Whether the tolerance was met; for a matrix that was given, whether it has a finite gap.
        solver: What made the coupling.
        precision: The arithmetic that made it.

    Example:
        >>> certify(torch.tensor([[0.5, 0.5]]), torch.zeros(1, 2)).gap.item()
        0.0
    """

    primal: Tensor
    dual: Tensor
    gap: Tensor
    query_error: Tensor
    key_error: Tensor
    distance: Tensor
    iterations: Tensor
    converged: Tensor
    solver: str
    precision: str

    def __str__(self) -> str:
        rows = [
            ("primal", f"{float(self.primal.flatten()[0]):.12g}" if self.primal.numel() == 1 else _span(self.primal)),
            ("dual", f"{float(self.dual.flatten()[0]):.12g}" if self.dual.numel() == 1 else _span(self.dual)),
            ("gap", f"<= {float(self.gap.max()):.1e}"),
            ("error of query masses", f"{float(self.query_error.max()):.1e} of the mass"),
            ("error of key masses", f"{float(self.key_error.max()):.1e} of the mass"),
            ("distance from the optimum", f"<= {float(self.distance.max()):.1e} of the mass"),
            ("iterations", f"{int(self.iterations.max())} by {self.solver}"),
            ("converged", f"{int(self.converged.sum())} of {self.converged.numel()}"),
            ("precision", f"{self.precision}; certificate in float64"),
        ]
        return "\n".join(f"{name:<26} {value}" for name, value in rows)


def _span(values: Tensor) -> str:
    return f"{float(values.min()):.6g} to {float(values.max()):.6g}"


def solution_certificate(
    problem: TransportProblem, measured: DualityGap, *, iterations: Tensor, converged: Tensor, solver: str
) -> Certificate:
    """Gather what one pass over all pairs measured, with what the solver says of itself."""
    total = torch.where((measured.mass > 0) & measured.mass.isfinite(), measured.mass, 1.0)
    distance = (measured.moved + measured.radius) / total
    return Certificate(
        primal=torch.where(measured.dual.isfinite(), measured.dual + measured.gap, math.inf),
        dual=measured.dual,
        gap=measured.gap,
        query_error=measured.query_error / total,
        key_error=measured.key_error / total,
        distance=distance,
        iterations=iterations,
        converged=converged & distance.isfinite(),
        solver=solver,
        precision=problem.affinity.precision,
    )


def certify(
    weights: Tensor,
    score: Tensor,
    log_prior: Tensor | None = None,
    epsilon: float = 1.0,
    *,
    regulariser: Tsallis | None = None,
) -> Certificate:
    """Certify any attention matrix, of whatever model or kernel, as a solution of its one-sided transport problem.

    The problem is ``min <p, -score> + epsilon KL(p || exp(log_prior))`` row by row with rows of mass 1 / n. The
    weights are taken as they are: what rows lack of one, and negative entries, count as distance; the gap is that of
    the rows divided by their sums, ``epsilon KL(p || softmax(score / epsilon + log_prior))`` averaged, a sum of terms
    that cannot be negative, in float64.

    Args:
        weights: Shape (..., n, m), any floating dtype, finite.
        score: Shape (..., n, m), the same as the kernel saw, scale included, cost units.
        log_prior: Shape (..., n, m), nats; -inf where inadmissible.
        epsilon: Temperature, cost units.
        regulariser: As that of a ``TransportProblem``, for sparsemax and entmax.

    Returns:
        The certificate; ``query_error`` is the mean over rows of ``|sum of the row - 1|``, and ``distance`` bounds
        twice the mean total variation between the rows and the exact attention weights.

    Raises:
        TypeError: If a tensor is not floating.
        ValueError: If a shape or value is out of range.

    Example:
        >>> exact = torch.tensor([[0.0, 1.0]]).softmax(-1)
        >>> float(certify(exact, torch.tensor([[0.0, 1.0]])).distance) < 1e-3
        True

    Source: duality, Litman 2025, arXiv 2508.08369.
    """
    check_floating(_OWNER, "weights", weights)
    check_no_nan(_OWNER, "weights", weights)
    check_floating(_OWNER, "score", score)
    wide = score.detach().double()
    prior = None if log_prior is None else check_floating(_OWNER, "log_prior", log_prior).detach().double()
    problem = TransportProblem(wide, epsilon=epsilon, log_prior=prior, regulariser=regulariser)
    shape = (*problem.batch_shape, *wide.shape[-2:])
    require(weights.shape == shape, _OWNER, "weights", f"have shape {tuple(shape)}", weights, "Match the score")
    with torch.no_grad():
        return _certified(problem, weights.detach())


def _certified(problem: TransportProblem, weights: Tensor) -> Certificate:
    """Measure the rows of ``weights`` against the closed form."""
    given = weights.double()
    positive = given.clamp(min=0)
    sums = positive.sum(-1, keepdim=True)
    rows = positive / torch.where(sums > 0, sums, 1.0)
    potential = torch.zeros(problem.num_keys, dtype=torch.float64, device=given.device)
    answer = respond(problem, potential).potential
    # The optimum is at hand, so the distance is measured; exp(log q) errs by the rounding of log q and one digit.
    if isinstance(problem.affinity, TsallisAffinity):
        prior = torch.zeros_like(rows) if problem.log_prior is None else problem.log_prior
        nats = problem.affinity.regulariser.divergence(rows, prior, slopes(problem, answer, potential))
        exact = problem.affinity.weights(potential, problem.epsilon)
        bend, error = problem.affinity.rounding(potential, problem.epsilon)
        rounding = bend * error
    else:
        log_weights, relative = problem.affinity.bounded_log_weights(potential, problem.epsilon)
        nats, exact = divergence(rows, log_weights), log_weights.exp()
        rounding = exact * relative
    nats = torch.where((sums > 0).squeeze(-1), nats.sum(-1), math.inf)
    digit = torch.finfo(exact.dtype).eps
    distance = (given - exact).abs().sum(-1) * (1 + 64 * digit) + (rounding + digit * exact).sum(-1)
    dual = dual_objective(problem, answer, potential)
    gap = problem.epsilon * nats.mean(-1)
    return Certificate(
        primal=dual + gap,
        dual=dual,
        gap=gap,
        query_error=(given.sum(-1) - 1).abs().mean(-1),
        key_error=torch.zeros_like(gap),
        distance=distance.mean(-1),
        iterations=torch.zeros_like(gap, dtype=torch.int64),
        converged=gap.isfinite(),
        solver="certify",
        precision=str(weights.dtype).removeprefix("torch."),
    )
