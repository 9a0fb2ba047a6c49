"""What softmax cannot see of a log-prior."""

from __future__ import annotations

import math

import torch

__all__ = ["centre_rows"]


def centre_rows(log_prior: torch.Tensor) -> torch.Tensor:
    """Remove from every row what softmax cannot see: its mean over the admissible keys.

    Args:
        log_prior: (..., Q, K), nats, -inf where a key is inadmissible.

    Returns:
        The same shape; every row with an admissible key has mean zero over them.

    Example:
        >>> centre_rows(torch.tensor([[1.0, -math.inf], [1.0, 3.0]]))
        tensor([[ 0., -inf],
                [-1.,  1.]])
    """
    seen = log_prior > -math.inf
    total = log_prior.masked_fill(~seen, 0.0).sum(-1, keepdim=True)
    return log_prior - total / seen.sum(-1, keepdim=True).clamp(min=1)
