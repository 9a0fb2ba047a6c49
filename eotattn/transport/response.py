"""The best answer of the queries to given key potentials: one softmax, in logs, for every problem and solver."""

# Legend: n queries, m keys; the leading dimensions are a batch.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.transport.problem import TransportProblem

__all__ = ["QueryResponse", "penalty_share", "respond"]


@dataclass(frozen=True, eq=False)
class QueryResponse:
    """What ``respond`` returns.

    Args:
        log_weights: Log of the attention weights, nats, shape (..., n, m); rows of the exponential sum to one.
        potential: Optimal query potential, cost units, shape (..., n).
        log_growth: Log of row mass over query marginal, nats, shape (..., n); zero under an infinite query penalty.
        soft_maximum: epsilon times the log-normaliser of a row, cost units, shape (..., n).

    Example:
        >>> respond(TransportProblem(torch.zeros(1, 2)), torch.zeros(2)).log_weights.exp()
        tensor([[0.5000, 0.5000]])

    Source: original.
    """

    log_weights: Tensor
    potential: Tensor
    log_growth: Tensor
    soft_maximum: Tensor

    @property
    def weights(self) -> Tensor:
        """The attention weights, shape (..., n, m); rows sum to one."""
        return self.log_weights.exp()


def penalty_share(penalty: float, epsilon: float) -> float:
    """Return ``penalty / (penalty + epsilon)``, the exponent of a penalised scaling step; one for a constraint.

    Args:
        penalty: Cost units, in [0, inf].
        epsilon: Temperature, cost units, positive.

    Returns:
        A number in [0, 1].

    Example:
        >>> penalty_share(3.0, 1.0), penalty_share(math.inf, 1.0)
        (0.75, 1.0)

    Source: Chizat et al. 2018.
    """
    return 1.0 if math.isinf(penalty) else penalty / (penalty + epsilon)


def respond(problem: TransportProblem, key_potential: Tensor, *, epsilon: float | None = None) -> QueryResponse:
    """Maximise the dual over the query potential, in closed form; differentiable.

    ``potential = -share * epsilon * log sum_j exp((score + key_potential) / epsilon + log_prior)`` with
    ``share = query_penalty / (query_penalty + epsilon)``, and ``weights = softmax`` of the same logits. A potential
    of -inf removes a key; one of +inf (a key out of everybody's reach) counts as zero.

    Args:
        problem: The problem.
        key_potential: Cost units, shape (..., m).
        epsilon: Another temperature than the problem's, for continuation; ``None`` is the problem's own.

    Returns:
        The response; see ``QueryResponse``.

    Example:
        >>> problem = TransportProblem(torch.tensor([[0.0, 1.0]]))
        >>> respond(problem, torch.zeros(2)).potential
        tensor([-1.3133])

    Source: closed form, Litman 2025, arXiv 2508.08369; with penalties, Chizat et al. 2018.
    """
    epsilon = problem.epsilon if epsilon is None else epsilon
    removed = (key_potential == -math.inf)[..., None, :]
    affinity = problem.score + torch.where(key_potential.isfinite(), key_potential, 0.0)[..., None, :]
    nats = affinity.new_zeros(()) if problem.log_prior is None else problem.log_prior
    nats = torch.where(removed, -math.inf, nats)
    # Subtracting the peak's two parts before dividing keeps full accuracy where score / epsilon is huge.
    with torch.no_grad():
        merged = affinity / epsilon + nats
        peak = merged.argmax(-1, keepdim=True)
        top = affinity.expand(merged.shape).gather(-1, peak)
        top_nats = nats.expand(merged.shape).gather(-1, peak)
    logits = (affinity - top) / epsilon + (nats - top_nats)
    remainder = logits.logsumexp(-1, keepdim=True)
    soft_maximum = (epsilon * (remainder + top_nats) + top).squeeze(-1)
    share = penalty_share(problem.query_penalty, epsilon)
    log_growth = (1.0 - share) * soft_maximum / epsilon
    return QueryResponse(logits - remainder, -share * soft_maximum, log_growth, soft_maximum)
