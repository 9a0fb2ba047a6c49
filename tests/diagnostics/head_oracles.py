"""What an attention map says, straight from the definitions; weights (..., Q, K), rows sum to one."""

import torch


def entropy(weights):
    """(..., Q) nats."""
    return -torch.special.xlogy(weights, weights).sum(-1)


def participation(weights):
    """(..., Q) sum_j p_ij^2."""
    return weights.square().sum(-1)


def column_concentration(weights):
    """(...,) sum of the squared column shares mean_i p_ij: Herfindahl's index."""
    return weights.mean(-2).square().sum(-1)


def doubly_stochastic_distance(weights):
    """(...,) total variation of the column shares from equal ones (Sander et al. 2022, arXiv 2110.11773)."""
    return (weights.mean(-2) - 1 / weights.shape[-1]).abs().sum(-1) / 2


def local_mass(weights, width):
    """(...,) mean weight within ``width`` tokens of the query."""
    position = torch.arange(weights.shape[-1])
    return (weights * ((position[:, None] - position).abs() <= width)).sum(-1).mean(-1)


def context_sensitivity(weights, key=0):
    """(..., Q) weight on all keys but one (Litman and Guo 2026, arXiv 2601.15380, definition 5.3)."""
    return weights.sum(-1) - weights[..., key]
