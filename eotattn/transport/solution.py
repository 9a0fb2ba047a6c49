"""The noun that holds the potentials of a transport problem and derives everything else, with its certificate."""

# Legend: n queries, m keys; the leading dimensions (...) are those of the problem's batch.

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_positive_int, require
from eotattn.transport.arithmetic import product
from eotattn.transport.certificates.certificate import Certificate, solution_certificate
from eotattn.transport.certificates.duality_gap import DualityGap, duality_gap
from eotattn.transport.optimality.implicit import envelope_value
from eotattn.transport.optimality.residual import marginal_residual
from eotattn.transport.optimality.response import (
    coupling_rows,
    loaded_potential,
    penalty_share,
    respond,
    row_mass,
    scaled,
)
from eotattn.transport.problems import TransportProblem
from eotattn.transport.problems.admissibility import check_broadcast
from eotattn.transport.problems.affinity import Affinity

__all__ = ["TransportSolution"]


@dataclass(frozen=True, eq=False, repr=False)
class TransportSolution:
    r"""Potentials of a transport problem; couplings, values and the duality gap are derived on demand.

    ``attend``, ``apply``, ``apply_transpose`` and the masses need no n x m numbers where the problem is factored;
    ``coupling`` and ``attention_weights`` form them.

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
        key_potential: Cost units, shape (..., m); zero in semi-relaxed problems.
        num_iterations: Whole numbers, shape of the batch.
        converged: Booleans, shape of the batch: whether the tolerance was met and all masses are finite.
        solver: Name of the solver.
        infeasible: Booleans, shape of the batch: whether the mask was found to admit no coupling with these marginals;
            ``None`` where that was not tested.

    Example:
        >>> solution = TransportSolution(
        ...     TransportProblem(torch.zeros(1, 2)), torch.full((1,), -0.6931), torch.zeros(2),
        ...     num_iterations=torch.tensor(0), converged=torch.tensor(True), solver="ClosedForm")
        >>> solution.attention_weights
        tensor([[0.5000, 0.5000]])

    Source: duality as in Chizat et al. 2018.
    """

    problem: TransportProblem
    query_potential: Tensor
    key_potential: Tensor
    num_iterations: Tensor
    converged: Tensor
    solver: str
    infeasible: Tensor | None = None

    # What carries gradients is not kept: a first reading under no_grad would cut the graph of every later one.
    @property
    def attention_weights(self) -> Tensor:
        """Shape (..., n, m); rows sum to one. Defined also for queries without mass."""
        weights = self.problem.affinity.weights(self.key_potential, self.problem.epsilon)
        return weights.expand(*self.problem.batch_shape, *weights.shape[-2:])

    @property
    def coupling(self) -> Tensor:
        """Shape (..., n, m); sums to one where a penalty is infinite, to what is optimal otherwise."""
        coupling = coupling_rows(self.problem, self.key_potential)(slice(None))
        return coupling.expand(*self.problem.batch_shape, *coupling.shape[-2:])

    @property
    def query_mass(self) -> Tensor:
        """Row sums of the coupling, shape (..., n)."""
        mass = row_mass(self.problem, respond(self.problem, self.key_potential))
        return mass.expand(*self.problem.batch_shape, -1)

    @property
    def key_mass(self) -> Tensor:
        """Column sums of the coupling, shape (..., m), without n x m numbers on a factored problem.

        The marginal of a query without mass receives zero gradient, from here and from ``apply_transpose``.
        """
        return self.coupling.sum(-2) if self.problem.regulariser is not None else self._offered()[0]

    def attend(self, value: Tensor) -> Tensor:
        """Apply the attention weights: the barycentric map of the coupling.

        Args:
            value: Shape (..., m, v), in the dtype of the potentials.

        Returns:
            ``sum_j attention_weights_ij value_j``, shape (..., n, v). A factored problem makes one fused call.

        Example:
            >>> from eotattn.transport import solve
            >>> solve(TransportProblem(torch.zeros(1, 2))).attend(torch.tensor([[0.0], [1.0]]))
            tensor([[0.5000]])
        """
        self._check_value("attend", value, self.problem.num_keys)
        return self.problem.affinity.average(self.key_potential, value, self.problem.epsilon)

    def apply(self, value: Tensor) -> Tensor:
        """Apply the coupling to values as ``attend`` takes them: ``sum_j coupling_ij value_j``, shape (..., n, v)."""
        self._check_value("apply", value, self.problem.num_keys)
        average = self.problem.affinity.average(self.key_potential, value, self.problem.epsilon)
        return scaled(self.query_mass, average)

    def apply_transpose(self, value: Tensor) -> Tensor:
        """Apply its transpose to values (..., n, v) of queries: ``sum_i coupling_ij value_i``, shape (..., m, v)."""
        self._check_value("apply_transpose", value, self.problem.num_queries)
        if self.problem.regulariser is not None:
            return product(self.coupling.mT, value)
        mass, loaded = self._offered()
        return scaled(mass, self.problem.affinity.transposed.average(loaded, value, self.problem.epsilon))

    def _offered(self) -> tuple[Tensor, Tensor]:
        """The mass of the keys, and the query potential with the mass of queries in it, at which keys see them."""
        problem, epsilon = self.problem, self.problem.epsilon
        loaded = loaded_potential(problem, respond(problem, self.key_potential), epsilon)
        total = -problem.affinity.transposed.soft_c_transform(loaded, epsilon)
        live = self.key_potential.isfinite() & total.isfinite()
        nats = (torch.where(live, total, 0.0) + torch.where(live, self.key_potential, 0.0)) / epsilon
        return torch.where(live, nats.exp(), 0.0).expand(*problem.batch_shape, -1), loaded

    def query_potential_at(self, query: Tensor) -> Tensor:
        """Evaluate the query potential at new queries, as if they had been there: the soft c-transform, penalised.

        Args:
            query: Stated as the problem's own: scores (..., r, m) of a dense problem, where their log-prior is zero;
                points or content (..., r, d) of a factored one.

        Returns:
            Cost units, shape (..., r).

        Raises:
            TypeError: If the dtype is another one.
            NotImplementedError: If the log-prior of the problem depends on positions of queries.

        Example:
            >>> from eotattn.transport import solve
            >>> problem = TransportProblem.from_points(torch.zeros(1, 2), torch.ones(3, 2), epsilon=1.0)
            >>> solve(problem).query_potential_at(torch.ones(1, 2))
            tensor([-1.0986])

        Source: out-of-sample potentials, Pooladian and Niles-Weed 2021.
        """
        problem = self.problem
        self._check_content("query", query, problem.affinity)
        transform = problem.affinity.with_queries(query).soft_c_transform(self.key_potential, problem.epsilon)
        return penalty_share(problem.query_penalty, problem.epsilon) * transform

    def key_potential_at(self, key: Tensor) -> Tensor:
        """Evaluate the key potential at new keys whose log-prior is that of their marginal.

        That is the canonical reference, the product of the marginals (``log_prior=key_marginal.log()``); there the
        potential is the soft c-transform of the other, penalised.

        Args:
            key: Stated as the problem's own: scores (..., r, n), queries last, of a dense problem; points or content
                (..., r, d) of a factored one.

        Returns:
            Cost units, shape (..., r).
        """
        problem = self.problem
        loaded = loaded_potential(problem, respond(problem, self.key_potential), problem.epsilon)
        self._check_content("key", key, problem.affinity.transposed)
        transform = problem.affinity.with_keys(key).transposed.soft_c_transform(loaded, problem.epsilon)
        return penalty_share(problem.key_penalty, problem.epsilon) * transform

    def _check_content(self, side: str, content: Tensor, affinity: Affinity) -> None:
        owner, wanted = f"TransportSolution.{side}_potential_at", affinity.tensors[0]
        assert wanted is not None
        check_floating(owner, side, content)
        rule = f"have dtype {wanted.dtype}"
        require(content.dtype == wanted.dtype, owner, side, rule, content, "Convert it", error=TypeError)
        fits = content.dim() >= 2 and content.shape[-1] == wanted.shape[-1]
        require(fits, owner, side, f"have shape (..., length, {wanted.shape[-1]})", content, "Match the problem")

    def _check_value(self, name: str, value: Tensor, length: int) -> None:
        owner, dtype = f"TransportSolution.{name}", self.problem.affinity.dtype
        check_floating(owner, "value", value)
        rule, remedy = f"have dtype {dtype}", "Convert it"
        require(value.dtype == dtype, owner, "value", rule, value, remedy, error=TypeError)
        fits = value.dim() >= 2 and value.shape[-2] == length
        require(fits, owner, "value", f"have shape (..., {length}, width)", value, "Match the problem")
        batch = self.problem.batch_shape
        check_broadcast(owner, "value", value, value.shape[:-2], batch, "Match the batch of the problem")

    def top_keys(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the largest attention weights of chosen queries.

        Args:
            queries: Whole numbers, shape (r,).
            k: How many keys a query, at most m.

        Returns:
            ``(weights, keys)``: shapes (..., r, k), largest first.

        Raises:
            TypeError: If ``queries`` are no whole numbers.
            ValueError: If there are not k keys, or a query is out of range.

        Example:
            >>> from eotattn.transport import solve
            >>> solve(TransportProblem(torch.tensor([[0.0, 1.0]]))).top_keys(torch.tensor([0]), 1)
            (tensor([[0.7311]]), tensor([[1]]))
        """
        owner, problem = "TransportSolution.top_keys", self.problem
        whole = isinstance(queries, Tensor) and queries.dtype == torch.int64 and queries.dim() == 1
        require(whole, owner, "queries", "be an int64 vector", queries, "Pass indices", error=TypeError)
        inside = bool(((queries >= 0) & (queries < problem.num_queries)).all())
        require(inside, owner, "queries", f"lie in 0 to {problem.num_queries - 1}", queries, "Check the indices")
        k = check_positive_int(owner, "k", k)
        require(k <= problem.num_keys, owner, "k", f"be at most {problem.num_keys}", k, "Ask for fewer")
        weights = problem.affinity.weights(self.key_potential, problem.epsilon, queries)
        found = weights.expand(*problem.batch_shape, *weights.shape[-2:]).topk(k, -1)
        return found.values, found.indices

    @cached_property
    def marginal_error(self) -> Tensor:
        """Summed distance of key mass from its target, relative to the total mass, shape of the batch; no gradient.

        The target is ``key_marginal exp(-key_potential / key_penalty)``, the key marginal itself for a constraint;
        zero in semi-relaxed problems. The query side holds exactly. It is measured in the arithmetic of the solver;
        that of ``certificate`` is independent.
        """
        if self.problem.key_marginal is None:
            return self.problem.query_marginal.new_zeros(self.problem.batch_shape)
        with torch.no_grad():
            return marginal_residual(self.problem, self.key_potential).error

    @property
    def primal(self) -> Tensor:
        """Objective of a feasible coupling, cost units, shape of the batch; +inf if none is at hand.

        Where both marginals are constraints the coupling is first rounded onto them (``rounded_coupling``), so the
        value never lies below the optimum. The gradient is the optimum's, by the envelope theorem. With a log-prior
        that is normalised, free keys and an infinite query penalty it is ``sum query_marginal * query_potential``.
        """
        dual = self.dual
        return torch.where(dual.isfinite(), dual + self.gap, torch.inf)

    @property
    def dual(self) -> Tensor:
        """Fenchel dual objective of the potentials, cost units, shape of the batch; never above the optimum.

        Up to the rounding of the problem's kernel, that is, and so is ``primal``; that of ``certificate`` is float64.
        The gradient takes the potentials as optimal (envelope theorem), so none flows into them.
        """
        return envelope_value(self.problem, self.query_potential, self.key_potential)

    @property
    def gap(self) -> Tensor:
        """Primal less dual, cost units, shape of the batch, without gradient: a bound on the error of either.

        A sum of terms that cannot be negative, in float64; +inf where no feasible coupling is at hand.
        """
        return self._gap.gap.to(self.problem.affinity.dtype)

    @property
    def cost(self) -> Tensor:
        """``<coupling, -score>``, cost units, shape of the batch, without gradient."""
        return self._gap.cost.to(self.problem.affinity.dtype)

    @property
    def entropy(self) -> Tensor:
        """``-sum coupling log coupling``, nats, shape of the batch, without gradient."""
        return self._gap.entropy.to(self.problem.affinity.dtype)

    @cached_property
    def certificate(self) -> Certificate:
        """What is proved about this solution: values, errors, and a bound on the distance from the optimum."""
        found = {"iterations": self.num_iterations, "converged": self.converged}
        return solution_certificate(self.problem, self._gap, **found, solver=self.solver)

    @cached_property
    def _gap(self) -> DualityGap:
        return duality_gap(self.problem, self.query_potential, self.key_potential)

    def raise_if_not_converged(self) -> TransportSolution:
        """Return the solution, or raise if some problem of the batch missed its tolerance.

        Returns:
            This solution, so that calls chain.

        Raises:
            RuntimeError: If ``converged`` is not true throughout.

        Example:
            >>> from eotattn.transport import solve
            >>> solve(TransportProblem(torch.zeros(1, 2))).raise_if_not_converged().solver
            'ClosedForm'
        """
        if not bool(self.converged.all()):
            raise RuntimeError(
                "TransportSolution: converged must be true for every problem; "
                f"got {self.status} by {self.solver} after {int(self.num_iterations.max())} iterations, "
                f"marginal error up to {float(self.marginal_error.max()):.1e}. "
                "Raise max_iterations, tolerance or epsilon; where infeasible, unmask pairs or change the marginals."
            )
        return self

    @property
    def status(self) -> str:
        """How many problems converged, are infeasible (no coupling meets mask and marginals), or did neither.

        Example:
            >>> from eotattn.transport import solve
            >>> solve(TransportProblem(torch.zeros(1, 2))).status
            '1 of 1 converged'
        """
        infeasible = torch.zeros_like(self.converged) if self.infeasible is None else self.infeasible
        counts = {
            "converged": self.converged,
            "infeasible": infeasible,
            "not converged": ~self.converged & ~infeasible,
        }
        total = self.converged.numel()
        return ", ".join(f"{int(one.sum())} of {total} {name}" for name, one in counts.items() if bool(one.any()))

    def __repr__(self) -> str:
        return (
            f"TransportSolution({self.problem}, solver={self.solver!r}, status={self.status!r}, "
            f"iterations={int(self.num_iterations.max())}, marginal_error={float(self.marginal_error.max()):.1e}, "
            f"gap={float(self.gap.max()):.1e})"
        )
