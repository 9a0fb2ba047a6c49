"""From a coupling that nearly satisfies its constraints to one that does, so that the primal value is a true bound."""

# Legend: n queries, m keys, r rows of a block; the leading dimensions are a batch.

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eotattn.transport.optimality.curvature import solve_curvature
from eotattn.transport.optimality.response import respond, row_mass
from eotattn.transport.problems import TransportProblem
from eotattn.transport.problems.affinity import Rows, is_constraint

__all__ = ["RoundedCoupling", "rounded_coupling"]


@dataclass(frozen=True, eq=False)
class RoundedCoupling:
    """A coupling given by vectors; any rows of it can be formed.

    ``row_mass_i weights_ij (1 + row_i + column_j)^+ row_factor_i column_factor_j + row_rest_i column_rest_j``.
    """

    problem: TransportProblem
    key_potential: Tensor  # of the weights, cost units, (..., m)
    row_mass: Tensor  # (..., n)
    row: Tensor  # relative change of rows, (..., n)
    column: Tensor  # relative change of columns, (..., m)
    row_factor: Tensor  # (..., n)
    column_factor: Tensor  # (..., m)
    row_rest: Tensor  # mass that rows lack, (..., n)
    column_rest: Tensor  # share of each column in what is missing, (..., m)

    def rows(self, index: Rows) -> Tensor:
        """Some rows of the coupling, shape (..., r, m)."""
        weights = self.problem.affinity.log_weights(self.key_potential, self.problem.epsilon, index).exp()
        change = (1 + self.row[..., index, None] + self.column[..., None, :]).clamp(min=0)
        factor = (self.row_mass * self.row_factor)[..., index, None] * self.column_factor[..., None, :]
        return weights * change * factor + self.spread(index)

    def spread(self, index: Rows) -> Tensor:
        """The part of some rows that is a product of marginals, shape (..., r, m)."""
        return self.row_rest[..., index, None] * self.column_rest[..., None, :]

    def sums(self) -> tuple[Tensor, Tensor]:
        """Row sums (..., n) and column sums (..., m), by blocks."""
        rows, columns = [], torch.zeros(())
        for index in self.problem.affinity.blocks():
            block = self.rows(index)
            rows.append(block.sum(-1))
            columns = columns.to(block) + block.sum(-2)
        return torch.cat(rows, -1), columns


def rounded_coupling(
    problem: TransportProblem, key_potential: Tensor, *, stated: TransportProblem | None = None
) -> RoundedCoupling:
    """Return a coupling that satisfies the constraints, near the queries' answer to ``key_potential``.

    Soft and free sides need nothing. A hard key side with soft queries rescales columns. Two hard sides are rounded:
    the coupling is first corrected on its own support, by the least relative change that repairs the marginals to
    first order; then rows and columns are shrunk to their marginals and what is missing is spread as a product.

    Source: rounding, Altschuler et al. 2017; correction on the support, original.
    """
    mass = row_mass(problem, respond(problem, key_potential)).expand(*problem.batch_shape, problem.num_queries)
    none, ones = torch.zeros_like(mass), torch.ones_like(mass)
    zero = mass.new_zeros((*problem.batch_shape, problem.num_keys))
    start = RoundedCoupling(problem, key_potential, mass, none, zero, ones, torch.ones_like(zero), none, zero)
    if problem.key_marginal is None or not is_constraint(problem.key_penalty):
        return start
    if not problem.is_balanced:
        _, columns = start.sums()
        return replace(start, column_factor=_ratio(problem.key_marginal, columns))
    return _spread(_shrunk(_corrected(start, problem if stated is None else stated)))


def _ratio(marginal: Tensor, mass: Tensor) -> Tensor:
    """Marginal over mass; zero where there is none."""
    return torch.where(mass > 0, marginal / torch.where(mass > 0, mass, 1.0), 0.0)


def _corrected(start: RoundedCoupling, stated: TransportProblem) -> RoundedCoupling:
    """Multiply by 1 + u_i + v_j such that the marginals hold to first order."""
    assert start.problem.key_marginal is not None
    assert stated.key_marginal is not None
    missing = start.problem.key_marginal - start.sums()[1]
    # Masses far below the others leave the narrower dtype, so what is missing is scaled to its range.
    scale = missing.abs().amax(-1, keepdim=True)
    right = missing / torch.where(scale > 0, scale, 1.0)
    potential, row_mass, right = (one.to(stated.affinity.dtype) for one in (start.key_potential, start.row_mass, right))
    column = solve_curvature(stated, potential, row_mass, stated.key_marginal, right, stated.epsilon)
    row = -stated.affinity.average(potential, column[..., None], stated.epsilon).squeeze(-1)
    return replace(start, row=row.to(missing) * scale, column=column.to(missing) * scale)


def _shrunk(coupling: RoundedCoupling) -> RoundedCoupling:
    """Scale rows, then columns, down to their marginals where they exceed them."""
    problem = coupling.problem
    assert problem.key_marginal is not None
    rows, _ = coupling.sums()
    coupling = replace(coupling, row_factor=_ratio(problem.query_marginal, rows).clamp(max=1.0))
    _, columns = coupling.sums()
    return replace(coupling, column_factor=_ratio(problem.key_marginal, columns).clamp(max=1.0))


def _spread(coupling: RoundedCoupling) -> RoundedCoupling:
    """Put what rows and columns lack where both lack it."""
    problem = coupling.problem
    assert problem.key_marginal is not None
    row_sums, column_sums = coupling.sums()
    rows = (problem.query_marginal - row_sums).clamp(min=0)
    columns = (problem.key_marginal - column_sums).clamp(min=0)
    total = columns.sum(-1, keepdim=True)
    return replace(coupling, row_rest=rows, column_rest=columns / torch.where(total > 0, total, 1.0))
