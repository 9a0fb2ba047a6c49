"""Sinkhorn's iteration in the log domain, with hard or soft marginals."""

from __future__ import annotations

from torch import Tensor

from eotattn.transport.optimality.keys import KeyBalance, stiffness
from eotattn.transport.optimality.response import penalty_share
from eotattn.transport.problems import TransportProblem

__all__ = ["sinkhorn_step"]


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
        >>> import torch
        >>> from eotattn.transport.optimality.keys import balance
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.5, 0.5]))
        >>> sinkhorn_step(problem, torch.zeros(2), balance(problem, torch.zeros(2)), 1.0)
        tensor([0., 0.])

    Source: Chizat et al. 2018; as attention, Sander et al. 2022; the constant, Sejourne et al. 2022.
    """
    response = epsilon * penalty_share(problem.key_penalty, epsilon)
    if state.excess is None:
        return key_potential + response * state.log_ratio
    constant = state.excess / stiffness(problem, epsilon)
    return key_potential + constant + response * (state.log_ratio - state.excess)
