"""Independent float64 rewrites that attention is measured against."""

import math

import torch


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def attention(query, key, value, *, log_prior=None, allowed=None, scale=None):
    """softmax(scale <q, k> + log_prior) v by einsum in float64; heads repeat; empty rows are zero.

    ``log_prior`` and ``allowed`` (true may attend) broadcast to (B, H, Q, K).
    """
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    key, value = (torch.stack([x[:, h // group] for h in range(query.shape[1])], 1) for x in (key, value))
    score = torch.einsum("bhqd,bhkd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if log_prior is not None:
        score = score + log_prior.double()
    if allowed is not None:
        score = torch.where(allowed, score, -math.inf)
    peak = score.amax(-1, keepdim=True)
    mass = torch.exp(score - torch.where(peak.isinf(), 0.0, peak))
    total = mass.sum(-1, keepdim=True)
    weights = mass / torch.where(total == 0, 1.0, total)
    return torch.einsum("bhqk,bhkv->bhqv", weights, value), weights


def causal(query_positions, key_positions):
    """True where a key lies at or before the query: (Q, K) or (B, 1, Q, K)."""
    seen = key_positions[..., None, :] <= query_positions[..., :, None]
    return seen if seen.dim() == 2 else seen[:, None]
