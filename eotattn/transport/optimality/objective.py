"""Primal and dual objective of a transport problem, with all mass terms, for any coupling and any potentials."""

# Legend: n queries, m keys; the leading dimensions are a batch.

from __future__ import annotations

import math

import torch
from torch import Tensor

from eotattn.transport.optimality.response import respond
from eotattn.transport.problems import TransportProblem
from eotattn.transport.problems.affinity import Number, is_absent, is_constraint, pairwise

__all__ = ["divergence", "dual_objective", "log_references", "primal_objective", "reference_mass", "slopes"]

#: Nats up to which a series serves; its first term left out is below 1e-12 of the sum.
_NEAR = 1e-2


def divergence(mass: Tensor, log_reference: Tensor) -> Tensor:
    """Return ``p log(p / q) - p + q`` elementwise: never negative, and accurate where p is nearly q.

    With ``u = log p - log q`` it is ``q (u exp(u) - expm1(u))``, whose series is summed where u is small.

    Source: Csiszar 1975, with the mass terms of Chizat et al. 2018.
    """
    positive = mass > 0
    reference = log_reference.exp()
    nats = torch.where(positive, torch.where(positive, mass, 1.0).log() - log_reference, 0.0)
    near = positive & (nats.abs() < _NEAR)
    small = torch.where(near, nats, 0.0)
    series = small.square() * (1 / 2 + small * (1 / 3 + small * (1 / 8 + small * (1 / 30 + small / 144))))
    return torch.where(near, reference * series, (mass * nats - mass + reference).clamp(min=0))


def reference_mass(problem: TransportProblem) -> Tensor:
    """Mass of the reference R on the keys that are there, shape of the batch; a key of zero marginal is not."""
    kept = None if problem.key_marginal is None else problem.key_marginal > 0
    mass = (problem.query_marginal * problem.affinity.log_prior_mass(kept).exp()).sum(-1)
    return mass.expand(problem.batch_shape)


def log_references(problem: TransportProblem) -> Tensor:
    """Log of the reference R of every pair, nats, shape (..., n, m or 1)."""
    log_marginal, log_prior = problem.query_marginal.log()[..., None], problem.log_prior
    return log_marginal if log_prior is None else log_marginal + log_prior


def slopes(problem: TransportProblem, query_potential: Tensor, key_potential: Tensor) -> Tensor:
    """``(score_ij + query_potential_i + key_potential_j) / epsilon``, shape (..., n, m)."""
    total = problem.score + query_potential[..., None] + key_potential[..., None, :]
    return total / pairwise(problem.epsilon)


def primal_objective(problem: TransportProblem, coupling: Tensor) -> Tensor:
    """Evaluate the primal objective of a coupling, cost units, shape of the batch.

    The coupling is taken as it is: under an infinite penalty its marginal is trusted, not checked. It is +inf where
    the coupling uses a forbidden pair.

    Source: Chizat et al. 2018.
    """
    score, log_reference = problem.score, log_references(problem)
    if problem.key_marginal is not None:
        log_reference = torch.where((problem.key_marginal > 0)[..., None, :], log_reference, -math.inf)
    apart = divergence if problem.regulariser is None else problem.regulariser.divergence
    value = (pairwise(problem.epsilon) * apart(coupling, log_reference) - coupling * score).sum((-2, -1))
    query_side = (coupling.sum(-1), problem.query_marginal, problem.query_penalty)
    key_side = (coupling.sum(-2), problem.key_marginal, problem.key_penalty)
    for mass, marginal, penalty in (query_side, key_side):
        if marginal is not None and not is_constraint(penalty) and not is_absent(penalty):
            value = value + (penalty * divergence(mass, marginal.log())).sum(-1)
    return value.expand(problem.batch_shape)


def dual_objective(problem: TransportProblem, query_potential: Tensor, key_potential: Tensor) -> Tensor:
    """Evaluate the Fenchel dual, cost units, shape of the batch; never above the optimum, whatever the potentials.

    ``D(f, g) = C(f; query_marginal, query_penalty) + C(g; key_marginal, key_penalty)
    + epsilon sum_ij R_ij (1 - exp((score_ij + f_i + g_j) / epsilon))`` with ``C(f; a, inf) = sum a f``,
    ``C(f; a, rho) = rho sum a (1 - exp(-f / rho))`` and, without a penalty, zero for f >= 0 and -inf otherwise. Another
    regulariser has its conjugate in place of ``exp - 1``.
    Key potentials may be -inf on keys without mass, and +inf on keys out of reach.

    Source: Chizat et al. 2018.
    """
    value = _concave_part(query_potential, problem.query_marginal, problem.query_penalty)
    key_marginal = torch.ones_like(key_potential) if problem.key_marginal is None else problem.key_marginal
    value = value + _concave_part(key_potential, key_marginal, problem.key_penalty)
    if problem.regulariser is None:
        response = respond(problem, key_potential)
        growth = ((query_potential - response.transform) / problem.epsilon).exp()
        # A query without mass contributes none, even where the exponential overflows.
        growth = torch.where((problem.query_marginal > 0) | growth.isfinite(), growth, 0.0)
        conjugate = (problem.query_marginal * growth).sum(-1) - reference_mass(problem)
    else:
        slope, prior = slopes(problem, query_potential, key_potential), problem.log_prior
        rows = problem.regulariser.conjugate(slope) * (1.0 if prior is None else prior.exp())
        conjugate = (problem.query_marginal * rows.sum(-1)).sum(-1)
    value = value - (problem.epsilon * conjugate[..., None]).squeeze(-1)
    impossible = (key_potential == math.inf) & problem.affinity.reachable(problem.query_marginal > 0)
    return torch.where(impossible.any(-1), -math.inf, value).expand(problem.batch_shape)


def _concave_part(potential: Tensor, marginal: Tensor, penalty: Number) -> Tensor:
    """Minus the conjugate of a marginal penalty at minus the potential."""
    if is_absent(penalty):
        return torch.where(potential >= 0, 0.0, -math.inf).to(potential.dtype).sum(-1)
    gain = potential if is_constraint(penalty) else -penalty * torch.expm1(-potential / penalty)
    # Zero mass at an infinite price costs nothing.
    gain = torch.where((marginal > 0) | gain.isfinite(), gain, 0.0)
    return (marginal * gain).sum(-1)
