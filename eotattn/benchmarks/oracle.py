"""Attention in float64 on chosen rows, in blocks: what errors are measured against.

Legend: B batch, H heads, R rows, K keys, D score width, V value width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.priors import LogPrior

__all__ = ["causal_rows", "gate_gradient", "relative_error", "slope_gradient"]


def causal_rows(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, prior: LogPrior | None, scale: float
) -> Tensor:
    """Causal attention of the first sample, in float64, on some queries.

    Args:
        query: (B, H, Q, D), positions 0, 1, 2, ...
        key: (B, H / G, Q, D).
        value: (B, H / G, Q, V).
        rows: (R,) indices of queries.
        prior: Log-prior with H heads.
        scale: Factor on the inner products.

    Returns:
        (H, R, V) float64.
    """
    groups = query.shape[1] // key.shape[1]
    keys = torch.arange(key.shape[2], device=key.device)
    outputs = []
    log_prior = None if prior is None else prior.dense(rows, keys, dtype=torch.float64)
    for h in range(query.shape[1]):
        score = scale * query[0, h, rows].double() @ key[0, h // groups].double().T
        score = score if log_prior is None else score + log_prior[h]
        score = score.masked_fill(keys > rows[:, None], float("-inf"))
        outputs.append(score.softmax(-1) @ value[0, h // groups].double())
    return torch.stack(outputs)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm of the last axis, averaged over the others."""
    actual, expected = actual.detach().double(), expected.detach()
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())


def slope_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    slopes: Tensor,
    scale: float,
    *,
    sink: float = -math.inf,
    block: int = 512,
) -> Tensor:
    """Gradient of <output, grad> with respect to the slope of every head, causal, (H,) float64.

    All of (1, H, Q, width); ``slopes`` (H,); ``sink`` is the logit of one more outcome. Lags are taken inside the sum,
    so nothing cancels.
    """
    result = []
    positions = torch.arange(query.shape[2], device=query.device, dtype=torch.float64)
    for h in range(query.shape[1]):
        q, k, v, g = (tensor[0, h].double() for tensor in (query, key, value, grad))
        total = q.new_zeros(())
        for start in range(0, q.shape[0], block):
            rows = slice(start, start + block)
            lag = positions[rows, None] - positions
            score = (scale * q[rows] @ k.T - slopes[h].double() * lag).masked_fill(lag < 0, float("-inf"))
            weights = functional.pad(score, (0, 1), value=sink).softmax(-1)[:, :-1]
            through = g[rows] @ v.T
            through = weights * (through - (weights * through).sum(-1, keepdim=True))
            total = total - (through * lag).sum()
        result.append(total)
    return torch.stack(result)


def gate_gradient(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, log_gates: Tensor, scale: float, block: int = 512
) -> Tensor:
    """Gradient of <output, grad> with respect to every log forgetting gate, causal, (H, Q) float64.

    All of (1, H, Q, width); ``log_gates`` (H, Q), nats. A gate has the gradient of the scores of all pairs whose key
    lies before its token and whose query does not.
    """
    result = torch.zeros(log_gates.shape, dtype=torch.float64, device=query.device)
    index = torch.arange(query.shape[2], device=query.device)
    for h in range(query.shape[1]):
        q, k, v, g = (tensor[0, h].double() for tensor in (query, key, value, grad))
        sums = log_gates[h].double().cumsum(0)
        for start in range(0, q.shape[0], block):
            rows = slice(start, start + block)
            hidden = index > index[rows, None]
            score = scale * q[rows] @ k.T + (sums[rows, None] - sums)
            weights = score.masked_fill(hidden, float("-inf")).softmax(-1)
            through = g[rows] @ v.T
            through = weights * (through - (weights * through).sum(-1, keepdim=True))
            result[h] += (through.cumsum(-1) - through).masked_fill(hidden, 0.0).sum(0)
    return result
