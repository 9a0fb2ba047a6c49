"""The closed form for free keys: one softmax, no iteration."""

from __future__ import annotations

import torch

from eotattn.transport.optimality.response import respond, row_mass
from eotattn.transport.problems import TransportProblem
from eotattn.transport.solution import TransportSolution

__all__ = ["solve_closed_form"]


def solve_closed_form(problem: TransportProblem) -> TransportSolution:
    """Solve a problem whose keys are free, exactly and differentiably.

    With ``z_ij = score_ij / epsilon + log_prior_ij`` and ``Z_i = sum_j exp(z_ij)`` the solution is
    ``coupling_ij = query_marginal_i Z_i^(epsilon / (query_penalty + epsilon)) softmax_j(z_ij)``. Under an infinite
    query penalty the exponent is zero: the rows are the attention weights times the query marginal.

    Args:
        problem: The problem, without a key marginal.

    Returns:
        The solution: key potential zero, no iterations, converged.

    Raises:
        NotImplementedError: If the problem has a key marginal.

    Example:
        >>> problem = TransportProblem(torch.tensor([[0.0, 1.0]]))
        >>> solve_closed_form(problem).attention_weights
        tensor([[0.2689, 0.7311]])

    Source: Litman 2025, arXiv 2508.08369; Litman and Guo 2026, arXiv 2601.15380, Prop. 3.1; finite penalty, original.
    """
    if problem.key_marginal is not None:
        raise NotImplementedError(
            "solve: method 'closed_form' has no solution for a problem with a key_marginal; "
            f"got {problem}. Choose method='newton', 'sinkhorn' or 'streaming'."
        )
    shape, device = problem.batch_shape, problem.query_marginal.device
    key_potential = problem.query_marginal.new_zeros((*shape, problem.num_keys))
    response = respond(problem, key_potential)
    return TransportSolution(
        problem,
        query_potential=response.potential.expand(*shape, problem.num_queries),
        key_potential=key_potential,
        num_iterations=torch.zeros(shape, dtype=torch.int64, device=device),
        converged=row_mass(problem, response).detach().isfinite().all(-1).expand(shape),
        method="closed_form",
    )
