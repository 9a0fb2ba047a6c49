"""Dense attention in plain tensor operations: the definition, with weights, in any dtype.

Legend: B batch, H query heads, G query heads a key head, Q queries, K keys, D score width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["attend"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    log_prior: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute softmax(scale * <query, key> + log_prior) and apply it to the values.

    16-bit inputs are computed in float32 and rounded once, at the end. A query without admissible keys has weights and
    output zero, and zero gradients.

    Args:
        query: (B, H, Q, D).
        key: (B, H / G, K, D).
        value: (B, H / G, K, V).
        scale: Factor on the inner products (1 / temperature).
        log_prior: Broadcastable to (B, H, Q, K), nats; -inf where inadmissible.
        mask: Boolean, broadcastable to (B, H, Q, K); true where a query may attend.
        dropout_p: Probability of dropping a weight.

    Returns:
        ``(output, weights, log_sum_exp)``: (B, H, Q, V) in the dtype of ``query``; (B, H, Q, K), rows sum to one before
        dropout, and (B, H, Q), nats, -inf without keys, both in float32 or float64.
    """
    computing = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    grouped_query = query.to(computing).unflatten(1, (key.shape[1], groups))
    score = scale * grouped_query @ key.to(computing).unsqueeze(2).transpose(-1, -2)
    score = score.flatten(1, 2)
    if log_prior is not None:
        score = score + log_prior.to(computing)
    if mask is not None:
        score = score.masked_fill(~mask, float("-inf"))
    admissible = (score != float("-inf")).any(-1, keepdim=True)  # NaN is not "inadmissible": it must stay visible
    score = torch.where(admissible, score, 0.0)
    log_sum_exp = torch.where(admissible.squeeze(-1), score.logsumexp(-1), float("-inf"))
    weights = torch.softmax(score, dim=-1)
    weights = torch.where(admissible, weights, 0.0)
    dropped = functional.dropout(weights, dropout_p) if dropout_p else weights
    output = dropped.unflatten(1, (key.shape[1], groups)) @ value.to(computing).unsqueeze(2)
    return output.flatten(1, 2).to(query.dtype), weights, log_sum_exp
