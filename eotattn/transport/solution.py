"""The noun that holds the potentials of a transport problem and derives everything else, with its certificate."""

# Legend: n queries, m keys; the leading dimensions (...) are those of the problem's batch.

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eotattn.transport.implicit import envelope_value
from eotattn.transport.keys import balance
from eotattn.transport.objective import dual_objective, primal_objective, reference_mass
from eotattn.transport.problem import TransportProblem
from eotattn.transport.response import QueryResponse, respond
from eotattn.transport.rounding import feasible_coupling

__all__ = ["TransportSolution"]


@dataclass(frozen=True, eq=False, repr=False)
class TransportSolution:
    r"""Potentials of a transport problem; couplings, values and the duality gap are derived on demand.

    ``coupling_ij = row_mass_i attention_weights_ij`` with
    ``attention_weights = softmax_j((score + key_potential) / epsilon + log_prior)``: the queries answer the key
    potential exactly, so rows always sum to what the query side asks for, and only keys can be out of balance. Any
    potentials may be stored, and ``gap`` then certifies how far from optimal the coupling is.

    Gauge: in balanced problems (both penalties infinite) a constant may move between the potentials; solvers choose
    ``sum key_marginal * key_potential = 0``. Otherwise the potentials are unique. Keys without mass have a potential
    of -inf, and keys with mass that no query may use, under a finite penalty, one of +inf.

    Args:
        problem: What was solved.
        query_potential: Cost units, shape (..., n).
        key_potential: Cost units, shape (..., m); zero for free keys.
        num_iterations: Whole numbers, shape of the batch.
        converged: Booleans, shape of the batch.
        method: Name of the solver.

    Example:
        >>> solution = TransportSolution(
        ...     TransportProblem(torch.zeros(1, 2)), torch.full((1,), -0.6931), torch.zeros(2),
        ...     num_iterations=torch.tensor(0), converged=torch.tensor(True), method="closed_form")
        >>> solution.attention_weights
        tensor([[0.5000, 0.5000]])

    Source: original; duality as in Chizat et al. 2018.
    """

    problem: TransportProblem
    query_potential: Tensor
    key_potential: Tensor
    num_iterations: Tensor
    converged: Tensor
    method: str

    # What carries gradients is not kept: a first reading under no_grad would cut the graph of every later one.
    @property
    def _response(self) -> QueryResponse:
        return respond(self.problem, self.key_potential)

    @property
    def attention_weights(self) -> Tensor:
        """Shape (..., n, m); rows sum to one. Defined also for queries without mass."""
        weights = self._response.weights
        return weights.expand(*self.problem.batch_shape, *weights.shape[-2:])

    @property
    def coupling(self) -> Tensor:
        """Shape (..., n, m); sums to one where a penalty is infinite, to what is optimal otherwise."""
        response = self._response
        coupling = (self.problem.query_marginal * response.log_growth.exp())[..., None] * response.weights
        return coupling.expand(*self.problem.batch_shape, *coupling.shape[-2:])

    @cached_property
    def marginal_error(self) -> Tensor:
        """Summed distance of key mass from its target, relative to the total mass, shape of the batch; no gradient.

        The target is ``key_marginal exp(-key_potential / key_penalty)``, the key marginal itself for a constraint;
        zero for free keys. The query side holds exactly.
        """
        if self.problem.key_marginal is None:
            return self.problem.score.new_zeros(self.problem.batch_shape)
        with torch.no_grad():
            return balance(self.problem, self.key_potential).error

    @property
    def primal(self) -> Tensor:
        """Objective of a feasible coupling, cost units, shape of the batch; +inf if none is at hand.

        Where both marginals are constraints the coupling is first rounded onto them (``feasible_coupling``), so the
        value never lies below the optimum. The gradient is the optimum's, by the envelope theorem. With a log-prior
        that is normalised, free keys and an infinite query penalty it is ``sum query_marginal * query_potential``.
        """
        number = self._primal_less_constant + self.problem.epsilon * reference_mass(self.problem).detach()
        dual = self.dual
        return number + torch.where(dual.isfinite(), dual - dual.detach(), 0.0)

    @property
    def dual(self) -> Tensor:
        """Fenchel dual objective of the potentials, cost units, shape of the batch; never above the optimum.

        The gradient takes the potentials as optimal (envelope theorem), so none flows into them.
        """
        return envelope_value(self.problem, self.query_potential, self.key_potential)

    @cached_property
    def gap(self) -> Tensor:
        """Primal less dual, cost units, shape of the batch, without gradient: a bound on the error of either.

        Zero at the optimum and, up to rounding, never negative; +inf where a value is not finite. It is formed
        without the mass of the reference, which both share and which may be huge.
        """
        with torch.no_grad():
            lower = dual_objective(self.problem, self.query_potential, self.key_potential)
            difference = self._primal_less_constant - lower
        return torch.where(difference.isfinite(), difference, torch.inf)

    @cached_property
    def _primal_less_constant(self) -> Tensor:
        with torch.no_grad():
            response = self._response
            row_mass = self.problem.query_marginal * response.log_growth.exp()
            return primal_objective(self.problem, feasible_coupling(self.problem, response.weights, row_mass))

    def raise_if_not_converged(self) -> TransportSolution:
        """Return the solution, or raise if some problem of the batch missed its tolerance.

        Returns:
            This solution, so that calls chain.

        Raises:
            RuntimeError: If ``converged`` is not true throughout.

        Example:
            >>> from eotattn.transport import solve
            >>> solve(TransportProblem(torch.zeros(1, 2))).raise_if_not_converged().method
            'closed_form'

        Source: original.
        """
        failed = int((~self.converged).sum())
        if failed:
            raise RuntimeError(
                "TransportSolution: converged must be true for every problem; "
                f"got {failed} of {self.converged.numel()} not converged by {self.method!r} "
                f"after {int(self.num_iterations.max())} iterations, "
                f"marginal error up to {float(self.marginal_error.max()):.1e}. "
                "Raise max_iterations, tolerance or epsilon, or check that the mask admits these marginals."
            )
        return self

    def __repr__(self) -> str:
        return (
            f"TransportSolution({self.problem}, method={self.method!r}, "
            f"converged={int(self.converged.sum())}/{self.converged.numel()}, "
            f"iterations={int(self.num_iterations.max())}, marginal_error={float(self.marginal_error.max()):.1e}, "
            f"gap={float(self.gap.max()):.1e})"
        )
