"""The closed form of semi-relaxed problems: one softmax, no iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.checks import fail
from eotattn.transport.optimality.response import respond, row_mass
from eotattn.transport.problems import TransportProblem
from eotattn.transport.solution import TransportSolution
from eotattn.transport.solvers.solver import Solver

__all__ = ["ClosedForm"]


@dataclass(frozen=True)
class ClosedForm(Solver):
    """Solve a semi-relaxed problem (no key marginal) exactly and differentiably.

    With ``z_ij = score_ij / epsilon + log_prior_ij`` and ``Z_i = sum_j exp(z_ij)`` the solution is
    ``coupling_ij = query_marginal_i Z_i^(epsilon / (query_penalty + epsilon)) softmax_j(z_ij)``. Under an infinite
    query penalty the exponent is zero: the rows are the attention weights times the query marginal.

    Example:
        >>> ClosedForm().run(TransportProblem(torch.tensor([[0.0, 1.0]])), None).attention_weights
        tensor([[0.2689, 0.7311]])

    Source: Litman 2025, arXiv 2508.08369; Litman and Guo 2026, arXiv 2601.15380, Prop. 3.1; finite penalty, Chizat et
    al. 2018.
    """

    def run(self, problem: TransportProblem, start: Tensor | None) -> TransportSolution:
        """See ``Solver``; a start would have no effect."""
        if not problem.is_semi_relaxed:
            remedy = "Choose Newton(), Anderson() or Sinkhorn()"
            fail("ClosedForm", "problem", "have no key_marginal", problem, remedy, error=NotImplementedError)
        if start is not None:
            fail("ClosedForm", "start", "be left out where the closed form applies", start, "It needs no iteration")
        shape, device = problem.batch_shape, problem.query_marginal.device
        key_potential = problem.query_marginal.new_zeros((*shape, problem.num_keys))
        response = respond(problem, key_potential)
        return TransportSolution(
            problem,
            query_potential=response.potential.expand(*shape, problem.num_queries),
            key_potential=key_potential,
            num_iterations=torch.zeros(shape, dtype=torch.int64, device=device),
            converged=row_mass(problem, response).detach().isfinite().all(-1).expand(shape),
            solver=self.name,
        )
