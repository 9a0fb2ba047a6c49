"""Sinkhorn's iteration in the log domain, with hard or soft marginals."""

from __future__ import annotations

from torch import Tensor

from eotattn.transport.keys import KeyBalance
from eotattn.transport.problem import TransportProblem
from eotattn.transport.response import penalty_share

__all__ = ["sinkhorn_step"]


def sinkhorn_step(problem: TransportProblem, key_potential: Tensor, state: KeyBalance, epsilon: float) -> Tensor:
    """Let the keys answer the queries: the exact maximiser of the dual in the key potential, the queries held.

    ``key_potential + epsilon share log(target / mass)`` with ``share = key_penalty / (key_penalty + epsilon)``. The
    queries answer when the next balance is drawn, so a step and a balance are one full iteration.

    Args:
        problem: The problem, with a key marginal.
        key_potential: Cost units, shape (..., m).
        state: Balance at that potential.
        epsilon: Temperature, cost units.

    Returns:
        The next key potential, shape (..., m).

    Example:
        >>> import torch
        >>> from eotattn.transport.keys import balance
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.5, 0.5]))
        >>> sinkhorn_step(problem, torch.zeros(2), balance(problem, torch.zeros(2)), 1.0)
        tensor([0., 0.])

    Source: Chizat et al. 2018; as attention, Sander et al. 2022.
    """
    return key_potential + epsilon * penalty_share(problem.key_penalty, epsilon) * state.log_ratio
