"""Primal and dual objective of a transport problem, with all mass terms, for any coupling and any potentials."""

# Legend: n queries, m keys; the leading dimensions are a batch.

from __future__ import annotations

import math

import torch
from torch import Tensor

from eotattn.transport.optimality.response import respond
from eotattn.transport.problems import TransportProblem

__all__ = ["divergence", "dual_objective", "primal_objective", "reference_mass"]


def divergence(mass: Tensor, log_mass_of_reference: Tensor) -> Tensor:
    """Return ``p log(p / q) - p`` elementwise; the missing ``+ q`` is constant in p.

    Args:
        mass: The p, non-negative.
        log_mass_of_reference: The log q, nats; -inf where q is zero.

    Returns:
        Nats times mass; zero where p is zero, whatever q; +inf where p is positive and q zero.

    Example:
        >>> divergence(torch.tensor([0.0, 1.0]), torch.tensor([-torch.inf, 0.0]))
        tensor([ 0., -1.])

    Source: original.
    """
    positive = mass > 0
    safe = torch.where(positive, mass, 1.0)
    return torch.where(positive, safe * (safe.log() - log_mass_of_reference) - safe, 0.0)


def reference_mass(problem: TransportProblem) -> Tensor:
    """Return ``sum_ij query_marginal_i exp(log_prior_ij)``, the mass of the reference R, shape of the batch.

    Args:
        problem: The problem.

    Returns:
        One number a problem; one where the log-prior is normalised and the query marginal sums to one.

    Example:
        >>> float(reference_mass(TransportProblem(torch.zeros(2, 3))))
        3.0

    Source: original.
    """
    mass = (problem.query_marginal * problem.affinity.log_prior_mass().exp()).sum(-1)
    return mass.expand(problem.batch_shape)


def primal_objective(problem: TransportProblem, coupling: Tensor) -> Tensor:
    """Evaluate the primal objective of a coupling, less the constant ``epsilon * reference_mass(problem)``.

    The coupling is taken as it is: under an infinite penalty its marginal is trusted, not checked.

    Args:
        problem: The problem.
        coupling: Shape (..., n, m), non-negative.

    Returns:
        Cost units, shape of the batch; +inf where the coupling uses a forbidden pair.

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2), epsilon=2.0)
        >>> float(primal_objective(problem, torch.full((1, 2), 0.5)))
        -3.386...

    Source: Chizat et al. 2018.
    """
    log_reference = problem.query_marginal.log()[..., None]
    score, log_prior = problem.affinity.rows(slice(None))
    if log_prior is not None:
        log_reference = log_reference + log_prior
    value = (problem.epsilon * divergence(coupling, log_reference) - coupling * score).sum((-2, -1))
    if 0 < problem.query_penalty < math.inf:
        value = value + problem.query_penalty * _soft(coupling.sum(-1), problem.query_marginal)
    if problem.key_marginal is not None and problem.key_penalty < math.inf:
        value = value + problem.key_penalty * _soft(coupling.sum(-2), problem.key_marginal)
    return value.expand(problem.batch_shape)


def dual_objective(problem: TransportProblem, query_potential: Tensor, key_potential: Tensor) -> Tensor:
    """Evaluate the Fenchel dual, less the constant ``epsilon * reference_mass(problem)``; a lower bound for any input.

    ``D(f, g) = C(f; query_marginal, query_penalty) + C(g; key_marginal, key_penalty)
    - epsilon sum_ij R_ij exp((score_ij + f_i + g_j) / epsilon)`` with ``C(f; a, inf) = sum a f``,
    ``C(f; a, rho) = rho sum a (1 - exp(-f / rho))`` and, without a penalty, zero for f >= 0 and -inf otherwise.

    Args:
        problem: The problem.
        query_potential: Cost units, shape (..., n).
        key_potential: Cost units, shape (..., m); -inf allowed on keys without mass, +inf on keys out of reach.

    Returns:
        Cost units, shape of the batch; never above the primal optimum, less the same constant.

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2), epsilon=2.0)
        >>> float(dual_objective(problem, torch.full((1,), -1.3863), torch.zeros(2)))
        -3.386...

    Source: Chizat et al. 2018.
    """
    response = respond(problem, key_potential)
    growth = ((query_potential + response.soft_maximum) / problem.epsilon).exp()
    # A query without mass contributes none, even where the exponential overflows.
    growth = torch.where((problem.query_marginal > 0) | growth.isfinite(), growth, 0.0)
    total = (problem.query_marginal * growth).sum(-1)
    impossible = (key_potential == math.inf) & problem.affinity.reachable(problem.query_marginal > 0)
    value = _concave_part(query_potential, problem.query_marginal, problem.query_penalty) - problem.epsilon * total
    key_marginal = torch.ones_like(key_potential) if problem.key_marginal is None else problem.key_marginal
    value = value + _concave_part(key_potential, key_marginal, problem.key_penalty)
    return torch.where(impossible.any(-1), -math.inf, value).expand(problem.batch_shape)


def _concave_part(potential: Tensor, marginal: Tensor, penalty: float) -> Tensor:
    """Minus the conjugate of a marginal penalty at minus the potential."""
    if penalty == 0:
        return torch.where(potential >= 0, 0.0, -math.inf).to(potential.dtype).sum(-1)
    gain = potential if math.isinf(penalty) else -penalty * torch.expm1(-potential / penalty)
    # Zero mass at an infinite price costs nothing.
    gain = torch.where((marginal > 0) | gain.isfinite(), gain, 0.0)
    return (marginal * gain).sum(-1)


def _soft(mass: Tensor, marginal: Tensor) -> Tensor:
    """The divergence of a marginal of the coupling from the marginal asked for, with its mass terms."""
    return divergence(mass, marginal.log()).sum(-1) + marginal.sum(-1)
