"""A head without signal returns to its prior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eotattn.transport.problems import TransportProblem
from eotattn.transport.theorems.comparison import Comparison, logit_size

__all__ = ["collapse_to_the_prior"]


def collapse_to_the_prior(score: Tensor, log_prior: Tensor | None = None, *, epsilon: float = 1.0) -> Comparison:
    """Compare the log-ratio of attention and prior with the range of the scores.

    With omega_i the range of ``score_ij`` over the admissible keys of query i and pi the normalised prior,
    ``|log p_ij - log pi_ij| <= omega_i / epsilon``, i.e. ``pi exp(-omega / epsilon) <= p <= pi exp(omega / epsilon)``.

    Args:
        score: Shape (..., n, m), cost units.
        log_prior: Shape (..., n, m), nats; -inf where inadmissible. ``None`` is uniform.
        epsilon: Temperature, cost units.

    Returns:
        The left side, shape (..., n, m), zero on inadmissible pairs, and the right, shape (..., n, 1), in nats.

    Raises:
        ValueError: If the problem is not well stated.

    Example:
        >>> collapse_to_the_prior(torch.tensor([[0.0, 1.0]])).right
        tensor([[1.]])

    Source: Litman and Guo 2026, arXiv 2601.15380, Theorem 5.1.
    """
    problem = TransportProblem(score, epsilon=epsilon, log_prior=log_prior)
    prior = torch.zeros_like(score) if log_prior is None else log_prior
    admissible = (prior > -math.inf).expand(problem.affinity.shape)
    prior = prior.log_softmax(-1)
    log_weights = problem.affinity.log_weights(torch.zeros_like(score[..., 0, :]), problem.epsilon)
    left = (torch.where(admissible, log_weights, 0.0) - torch.where(admissible, prior, 0.0)).abs()
    wide = score.expand(admissible.shape)
    high, low = (torch.where(admissible, wide, sign * -math.inf) for sign in (1, -1))
    right = (high.amax(-1, keepdim=True) - low.amin(-1, keepdim=True)) / epsilon
    statement = "|log p - log pi| <= range of the scores / epsilon"
    magnitude = logit_size(score, log_prior, epsilon)
    return Comparison(statement, left, right, "<=", magnitude=magnitude)
