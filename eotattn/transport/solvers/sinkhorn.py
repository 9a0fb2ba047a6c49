"""Sinkhorn's iteration in the log domain, with hard or soft marginals."""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.transport.optimality.keys import KeyBalance, stiffness
from eotattn.transport.optimality.response import penalty_share
from eotattn.transport.problems import TransportProblem

__all__ = ["sinkhorn_move", "sinkhorn_step"]


def sinkhorn_step(problem: TransportProblem, key_potential: Tensor, state: KeyBalance, epsilon: float) -> Tensor:
    """Move all keys by the best constant, then let each answer the queries: two exact maximisations of the dual.

    The constant makes total target and total mass equal; without it, totals that differ take penalty / epsilon steps to
    meet. Then, the queries held, a key moves by ``epsilon share log(target / mass)`` with ``share = key_penalty /
    (key_penalty + epsilon)``. The queries answer when the next balance is drawn, so a step and a balance are one full
    iteration. In balanced problems the constant is free and stays.

    Args:
        problem: The problem, with a key marginal.
        key_potential: Cost units, shape (..., m).
        state: Balance at that potential.
        epsilon: Temperature, cost units.

    Returns:
        The next key potential, shape (..., m).

    Example:
        >>> from eotattn.transport.optimality.keys import balance
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.5, 0.5]))
        >>> sinkhorn_step(problem, torch.zeros(2), balance(problem, torch.zeros(2)), 1.0)
        tensor([0., 0.])

    Source: Chizat et al. 2018; as attention, Sander et al. 2022; the constant, Sejourne et al. 2022.
    """
    move, length = sinkhorn_move(problem, state, epsilon)
    return torch.add(key_potential, move, alpha=length)


def sinkhorn_move(problem: TransportProblem, state: KeyBalance, epsilon: float) -> tuple[Tensor, float]:
    """Return what ``sinkhorn_step`` adds to the key potential: a direction, and how far to go.

    Args:
        problem: The problem, with a key marginal.
        state: Balance at the key potential.
        epsilon: Temperature, cost units.

    Returns:
        Nats, shape (..., m), zero on keys without mass but for the constant; and cost units a nat.

    Example:
        >>> from eotattn.transport.optimality.keys import balance
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.5, 0.5]))
        >>> sinkhorn_move(problem, balance(problem, torch.zeros(2)), 1.0)
        (tensor([0., 0.]), 1.0)

    Source: as for ``sinkhorn_step``.
    """
    length = epsilon * penalty_share(problem.key_penalty, epsilon)
    if state.excess is None:
        return state.log_ratio, length
    lift = 1.0 / (length * stiffness(problem, epsilon)) - 1.0
    return torch.add(state.log_ratio, state.excess, alpha=lift), length
