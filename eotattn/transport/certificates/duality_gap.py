"""One pass over all pairs: the duality gap of a pair of potentials, as a sum of terms that cannot be negative."""

# Legend: n queries, m keys; the leading dimensions are a batch.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.transport.arithmetic import full_precision
from eotattn.transport.certificates.rounding import RoundedCoupling, rounded_coupling
from eotattn.transport.optimality.objective import divergence, dual_objective, log_references, slopes
from eotattn.transport.optimality.response import coupling_rows, respond, scaled
from eotattn.transport.problems import TransportProblem
from eotattn.transport.problems.affinity import Number, is_absent, is_constraint
from eotattn.transport.problems.thresholds import TsallisAffinity

__all__ = ["DualityGap", "duality_gap", "pinsker_radius", "refined", "rounding_radius"]

#: Mass, in machine epsilons of the total, that rounding may put on a forbidden pair.
_DROPPED = 64


@dataclass(frozen=True, eq=False)
class DualityGap:
    """What ``duality_gap`` returns, float64, of the shape of the batch; "stored" is the coupling of the potentials."""

    dual: Tensor  # of the potentials, cost units, with all constants
    gap: Tensor  # primal of the rounded coupling less that dual, cost units
    moved: Tensor  # summed distance between the coupling as it is returned, in its own dtype, and the rounded one
    radius: Tensor  # bound for the summed distance of the rounded coupling from the optimum
    mass: Tensor  # total of the rounded coupling
    query_error: Tensor  # summed distance of the row masses of the stored coupling from their target
    key_error: Tensor  # the same for the keys; zero for free keys
    cost: Tensor  # ``<coupling, -score>`` of the stored coupling, cost units
    entropy: Tensor  # ``-sum P log P`` of the stored coupling, nats


def refined(problem: TransportProblem) -> TransportProblem:
    """Return the problem in float64, without gradients, hard marginals summing to one exactly."""
    wide = problem.with_leaves(*(None if leaf is None else leaf.detach().double() for leaf in problem.leaves))
    *parts, query, key = wide.tensors
    assert query is not None
    query = query / query.sum(-1, keepdim=True) if is_constraint(problem.query_penalty) else query
    if key is not None and is_constraint(problem.key_penalty):
        key = key / key.sum(-1, keepdim=True)
    return wide.with_tensors(*parts, query, key)


def pinsker_radius(gap: Tensor, mass: Tensor, epsilon: Number, *, rounding: Tensor | float = 0.0) -> Tensor:
    """Bound the summed distance of a feasible coupling from the optimal one by its duality gap.

    The objective is strongly convex, ``gap >= epsilon KL(P || optimum)``. With K the quotient and t the distance,
    ``t^2 <= (2 mass + 4/3 t) K`` (Pinsker's inequality for unequal masses), hence
    ``t <= 2/3 K + sqrt((2/3 K)^2 + 2 mass K)``.

    Source: Pinsker's inequality, in the pointwise form 3 (u - 1)^2 <= (2 u + 4) (u log u - u + 1).
    """
    nats = ((2 * gap.clamp(min=0) / epsilon).sqrt() + rounding).square() / 2
    linear = 2 / 3 * nats
    return linear + (linear.square() + 2 * mass * nats).sqrt()


def rounding_radius(mass: Tensor, log_reference: Tensor, rounding: Tensor) -> Tensor:
    """Root mean square of the rounding of ``log p - log q``, over all pairs of a row: mass to the power one half.

    Near p = q the divergence is half the mean square of that difference, so its root errs by at most this much.
    """
    digit = 0.5 * torch.finfo(mass.dtype).eps
    error = rounding + digit * (4 + torch.where(mass > 0, mass, 1.0).log().abs())
    return ((mass + log_reference.exp()) * error.square()).sum(-1).sqrt()


def duality_gap(problem: TransportProblem, query_potential: Tensor, key_potential: Tensor) -> DualityGap:
    """Round the coupling and measure it against the potentials, in float64 and by blocks of rows.

    With Q the coupling of the potentials, ``Q_ij = R_ij exp((score_ij + f_i + g_j) / epsilon)``, and P feasible, the
    gap is ``epsilon KL(P || Q)`` plus, for a soft marginal, ``penalty KL(its mass || marginal exp(-potential /
    penalty))``: no difference of large numbers, and no trust in the kernels that found the potentials.

    Under Tsallis's divergence it is the sum of ``epsilon R (f(P / R) + f*(slope) - slope P / R)``, with the slopes of
    the potentials; row by row ``(sum |p - optimum|)^2 <= 2^(3 - alpha) (sum prior)^(alpha - 1) gap / epsilon``, since
    the second derivative of f is ``t^(alpha - 2)``.
    """
    wide = refined(problem)
    query_potential, key_potential = query_potential.detach().double(), key_potential.detach().double()
    measure = _measure if problem.regulariser is None else _measure_thresholds
    with torch.no_grad(), full_precision(key_potential):
        return measure(wide, problem.detached(), query_potential, key_potential)


def _measure(
    problem: TransportProblem, stated: TransportProblem, query_potential: Tensor, key_potential: Tensor
) -> DualityGap:
    """The pass itself; ``problem`` is wide, ``stated`` the same problem with its own kernels."""
    rounded = rounded_coupling(problem, key_potential, stated=stated)
    returned = coupling_rows(stated, key_potential.to(stated.affinity.dtype))
    sums = _Sums(rounded, _log_rows(problem, query_potential, key_potential), returned)
    for index in problem.affinity.blocks():
        sums.add(index)
    mass = torch.cat(sums.rows, -1)
    key_marginal = torch.ones_like(key_potential) if problem.key_marginal is None else problem.key_marginal
    query_side = (problem.query_marginal, query_potential, problem.query_penalty)
    key_side = (key_marginal, key_potential, problem.key_penalty)
    gap = _scaled(problem.epsilon, sums.divergence) + _side_gap(mass, *query_side) + _side_gap(sums.columns, *key_side)
    unusable = sums.misplaced > _DROPPED * torch.finfo(torch.float64).eps * mass.sum(-1)
    stranded = (key_potential == math.inf) & problem.affinity.reachable(problem.query_marginal > 0)
    gap = torch.where(gap.isfinite() & ~unusable & ~stranded.any(-1), gap, math.inf)
    batch = problem.batch_shape
    total = _finite(mass.sum(-1))
    epsilon = problem.epsilon.squeeze(-1) if isinstance(problem.epsilon, Tensor) else problem.epsilon
    return DualityGap(
        dual=dual_objective(problem, query_potential, key_potential),
        gap=gap.expand(batch),
        moved=_finite(sums.moved).expand(batch),
        radius=pinsker_radius(gap, total, epsilon, rounding=_finite(sums.rounding.sqrt())).expand(batch),
        mass=total.expand(batch),
        query_error=_finite(_error(rounded.row_mass, *query_side)).expand(batch),
        key_error=_finite(_error(sums.stored_columns, *key_side)).expand(batch),
        cost=_finite(sums.cost).expand(batch),
        entropy=_finite(sums.entropy).expand(batch),
    )


def _measure_thresholds(
    problem: TransportProblem, stated: TransportProblem, query_potential: Tensor, key_potential: Tensor
) -> DualityGap:
    """The same for rows that a threshold answers, all at once: rounding them is dividing by their sums."""
    affinity, regulariser, epsilon = problem.affinity, problem.regulariser, problem.epsilon
    assert isinstance(affinity, TsallisAffinity)
    assert regulariser is not None
    marginal = problem.query_marginal
    weights = affinity.weights(key_potential, epsilon)
    stored = marginal[..., None] * weights
    feasible = stored / weights.sum(-1, keepdim=True)
    slope = slopes(problem, query_potential, key_potential)
    nats = regulariser.divergence(feasible, log_references(problem), slope).sum((-2, -1))
    side = _side_gap(feasible.sum(-2), torch.ones_like(key_potential), key_potential, problem.key_penalty)
    bend, error = affinity.rounding(key_potential, epsilon)
    hidden = (0.5 * marginal * (bend * error.square()).sum(-1)).sum(-1)
    reference = affinity.log_prior_mass().exp() ** regulariser.beta
    strength = 2 ** (3 - regulariser.alpha) * (marginal * reference).sum(-1)
    returned = coupling_rows(stated, key_potential.to(stated.affinity.dtype))(slice(None))
    measured = DualityGap(
        dual=dual_objective(problem, query_potential, key_potential),
        gap=_scaled(epsilon, nats) + side,
        moved=(feasible - returned).abs().sum((-2, -1)),
        radius=strength.sqrt() * ((nats + _scaled(1 / epsilon, side)).sqrt() + hidden.sqrt()),
        mass=marginal.sum(-1),
        query_error=(stored.sum(-1) - marginal).abs().sum(-1),
        key_error=marginal.new_zeros(()),
        cost=-(stored * problem.score).sum((-2, -1)),
        entropy=torch.special.entr(stored).sum((-2, -1)),
    )
    return DualityGap(**{name: _finite(value).expand(problem.batch_shape) for name, value in vars(measured).items()})


def _scaled(number: Number, value: Tensor) -> Tensor:
    """A number a problem times a value of the shape of the batch."""
    return (number * value[..., None]).squeeze(-1)


def _finite(number: Tensor) -> Tensor:
    """The number; +inf where masses beyond the doubles left none."""
    return torch.where(number.isnan(), math.inf, number)


def _log_rows(problem: TransportProblem, query_potential: Tensor, key_potential: Tensor) -> Tensor:
    """Log of the row sums of the potentials' coupling, nats, shape (..., n)."""
    transform = respond(problem, key_potential).transform
    nats = problem.query_marginal.log() + (query_potential - transform) / problem.epsilon
    return torch.where(problem.query_marginal > 0, nats, -math.inf)


class _Sums:
    """What is added up over blocks of rows."""

    def __init__(self, rounded: RoundedCoupling, log_rows: Tensor, returned: Callable[[slice], Tensor]) -> None:
        self.rounded, self.log_rows, self.returned = rounded, log_rows, returned
        zero = log_rows.new_zeros(())
        self.divergence = self.moved = self.misplaced = self.cost = self.entropy = self.rounding = zero
        self.columns = self.stored_columns = zero
        self.rows: list[Tensor] = []

    def add(self, index: slice) -> None:
        """Add one block."""
        rounded, problem = self.rounded, self.rounded.problem
        log_weights, rounding = problem.affinity.bounded_log_weights(rounded.key_potential, problem.epsilon, index)
        stored = scaled(rounded.row_mass[..., index], log_weights.exp())
        forbidden = log_weights == -math.inf
        self.misplaced = self.misplaced + (rounded.spread(index) * forbidden).sum((-2, -1))
        feasible = torch.where(forbidden, 0.0, rounded.rows(index))
        log_reference = self.log_rows[..., index, None] + log_weights
        self.divergence = self.divergence + divergence(feasible, log_reference).sum((-2, -1))
        self.rounding = self.rounding + rounding_radius(feasible, log_reference, rounding).square().sum(-1)
        self.moved = self.moved + (feasible - self.returned(index)).abs().sum((-2, -1))
        self.cost = self.cost - (stored * problem.affinity.rows(index)[0]).sum((-2, -1))
        self.entropy = self.entropy + torch.special.entr(stored).sum((-2, -1))
        self.rows.append(feasible.sum(-1))
        self.columns = self.columns + feasible.sum(-2)
        self.stored_columns = self.stored_columns + stored.sum(-2)


def _side_gap(mass: Tensor, marginal: Tensor, potential: Tensor, penalty: Number) -> Tensor:
    """What one side adds to the gap; a feasible hard side adds nothing."""
    if is_constraint(penalty):
        return mass.new_zeros(())
    if is_absent(penalty):
        return torch.where((potential >= 0).all(-1), (mass * potential).sum(-1), math.inf)
    return (penalty * divergence(mass, marginal.log() - _finite_part(potential) / penalty)).sum(-1)


def _finite_part(potential: Tensor) -> Tensor:
    """The potential, zero where it is -inf: there is no mass."""
    return torch.where(potential == -math.inf, 0.0, potential)


def _error(mass: Tensor, marginal: Tensor, potential: Tensor, penalty: Number) -> Tensor:
    """Summed distance of mass from its target."""
    if is_absent(penalty):
        return mass.new_zeros(mass.shape[:-1])
    return (mass - marginal * (-_finite_part(potential) / penalty).exp()).abs().sum(-1)
