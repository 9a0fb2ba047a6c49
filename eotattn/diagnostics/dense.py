"""Dense forms: what an attention map says, straight from the definitions. For maps that fit in memory, and as oracles.

Legend: Q queries, K keys, D score width. Weights p_ij are (..., Q, K), rows sum to one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_no_nan, check_positive_int, require

__all__ = [
    "column_concentration",
    "context_sensitivity",
    "doubly_stochastic_distance",
    "entropy",
    "local_mass",
    "participation",
    "row_certificate",
    "score_variance_split",
]


def entropy(weights: Tensor) -> Tensor:
    """Compute -sum_j p_ij ln p_ij.

    Args:
        weights: (..., Q, K), rows sum to one.

    Returns:
        (..., Q) nats, in [0, ln K].

    Example:
        >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.6931, 0.0000])
    """
    return -torch.special.xlogy(_checked("entropy", weights), weights).sum(-1) + 0.0


def participation(weights: Tensor) -> Tensor:
    """Compute sum_j p_ij^2; its inverse is the number of keys that take part.

    Args:
        weights: (..., Q, K), rows sum to one.

    Returns:
        (..., Q) dimensionless, in [1 / K, 1].

    Example:
        >>> participation(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.5000, 1.0000])
    """
    return _checked("participation", weights).square().sum(-1)


def column_concentration(weights: Tensor) -> Tensor:
    """Compute sum_j c_j^2 of the column shares c_j = mean_i p_ij: how few keys the head as a whole looks at.

    Args:
        weights: (..., Q, K), rows sum to one.

    Returns:
        (...,) dimensionless, in [1 / K, 1]; one if all queries attend one key (Herfindahl's index).

    Example:
        >>> column_concentration(torch.eye(4))
        tensor(0.2500)
    """
    return _checked("column_concentration", weights).mean(-2).square().sum(-1)


def doubly_stochastic_distance(weights: Tensor) -> Tensor:
    """Compute half sum_j |c_j - 1 / K|, the total variation from equal column shares c_j = mean_i p_ij.

    Args:
        weights: (..., Q, K), rows sum to one.

    Returns:
        (...,) dimensionless, in [0, 1 - 1 / K]; zero if every key receives as much as any other.

    Source:
        Doubly stochastic attention: Sander et al. 2022 (arXiv 2110.11773).

    Example:
        >>> doubly_stochastic_distance(torch.eye(4))
        tensor(0.)
    """
    share = _checked("doubly_stochastic_distance", weights).mean(-2)
    return (share - 1 / weights.shape[-1]).abs().sum(-1) / 2


def local_mass(weights: Tensor, width: int) -> Tensor:
    """Compute the weight within ``width`` tokens, mean_i sum_{|i - j| <= width} p_ij.

    Args:
        weights: (..., L, L), rows sum to one.
        width: Largest distance, tokens, at least zero.

    Returns:
        (...,) dimensionless, in [0, 1].

    Example:
        >>> local_mass(torch.full((4, 4), 0.25), 0)
        tensor(0.2500)
    """
    check_positive_int("local_mass", "width", width, minimum=0)
    queries, keys = _checked("local_mass", weights).shape[-2:]
    require(queries == keys, "local_mass", "weights", "be square", weights, "Pass whole sequences")
    position = torch.arange(keys, device=weights.device)
    near = (position[:, None] - position).abs() <= width
    return (weights * near).sum(-1).mean(-1)


def context_sensitivity(weights: Tensor, key: int = 0) -> Tensor:
    """Compute Psi_i = 1 - p_ij*: value perturbations of size eps on the context move the output by at most eps Psi.

    Args:
        weights: (..., Q, K), rows sum to one.
        key: Index j* of the sink.

    Returns:
        (..., Q) dimensionless, in [0, 1].

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), definition 5.3 and theorem 5.4.

    Example:
        >>> context_sensitivity(torch.tensor([[0.75, 0.25]]))
        tensor([0.2500])
    """
    keys = _checked("context_sensitivity", weights).shape[-1]
    exists = isinstance(key, int) and -keys <= key < keys
    require(exists, "context_sensitivity", "key", f"be an index of the {keys} keys", key, "Name an existing key")
    return weights.sum(-1) - weights[..., key]


def row_certificate(weights: Tensor, logits: Tensor) -> Tensor:
    """Compute the duality gap of computed rows, lse_i - sum_j p_ij z_ij + sum_j p_ij ln p_ij = KL(p_i || softmax(z_i)).

    Zero exactly for the true weights of the entropic problem; the total variation error is at most sqrt(gap / 2). Where
    rounding leaves a row that does not sum to one, it is the divergence of unnormalised measures, which is not negative
    either.

    Args:
        weights: (..., Q, K) computed weights, rows sum to one up to rounding.
        logits: (..., Q, K) scores plus log-prior, nats; -inf where inadmissible.

    Returns:
        (..., Q) nats, at least zero up to rounding; infinite where an inadmissible key has weight.

    Source:
        Litman 2025 (arXiv 2508.08369), duals of the one-sided problem; Pinsker's inequality.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 0.0]])
        >>> bool(row_certificate(torch.softmax(logits, -1), logits).abs() < 1e-6)
        True
    """
    _checked("row_certificate", weights)
    rule = f"have the shape {tuple(weights.shape)} of the weights"
    require(logits.shape == weights.shape, "row_certificate", "logits", rule, logits, "Match them")
    wide, p = logits.double(), weights.double()
    total, reward = p.sum(-1), torch.where(p > 0, p * wide, 0.0).sum(-1)
    gap = total * torch.logsumexp(wide, -1) - reward + torch.special.xlogy(p, p).sum(-1) + (1 - total)
    return gap.to(weights.dtype)


def score_variance_split(query: Tensor, key: Tensor, *, scale: float) -> dict[str, Tensor]:
    """Split the variance of row-centred scores over positions and over independent draws of query and key content.

    With position means q_i, k_j (over sequences) and deviations dq_i, dk_j, the score is scale times
    q_i k_j (position) + q_i dk_j (key content) + dq_i k_j (query x position) + dq_i dk_j (content x content); the four
    are uncorrelated where queries and keys come from different sequences. Keys are centred in every sequence first,
    which is what softmax sees.

    Args:
        query: (N, H, L, D) of N sequences of one length.
        key: (N, H, L, D).
        scale: Factor on the inner products.

    Returns:
        Name -> (H,) variance, nats squared; they sum to the mean squared row-centred score over all pairs of sequences.

    Source:
        Hoeffding 1948; the application to scores is original.

    Example:
        >>> q, k = torch.randn(2, 5, 1, 4, 3, generator=torch.Generator().manual_seed(0))
        >>> sorted(score_variance_split(q, k, scale=1.0))
        ['content x content', 'key content', 'position', 'query x position']
    """
    check_floating("score_variance_split", "query", query)
    same = query.dim() == 4 and query.shape == key.shape
    require(
        same, "score_variance_split", "key", f"have the query's shape {tuple(query.shape)}", key, "Repeat key heads"
    )
    query, key = query.double() * scale, key.double()
    key = key - key.mean(2, keepdim=True)
    parts = {"mean": (query.mean(0), key.mean(0)), "rest": (query - query.mean(0), key - key.mean(0))}

    def gram(side: int, part: str) -> Tensor:
        x = parts[part][side]
        x = x if x.dim() == 4 else x[None]
        return torch.einsum("nhld,nhle->hde", x, x) / (x.shape[0] * x.shape[2])

    names = {"position": ("mean", "mean"), "key content": ("mean", "rest")}
    names |= {"query x position": ("rest", "mean"), "content x content": ("rest", "rest")}
    return {name: (gram(0, a) * gram(1, b)).sum((-1, -2)) for name, (a, b) in names.items()}


def _checked(owner: str, weights: Tensor) -> Tensor:
    check_floating(owner, "weights", weights)
    remedy = "Pass softmax weights of shape (..., Q, K)"
    require(weights.dim() >= 2 and weights.numel() > 0, owner, "weights", "have shape (..., Q, K)", weights, remedy)
    check_no_nan(owner, "weights", weights)
    require(float(weights.min()) >= 0, owner, "weights", "be non-negative", float(weights.min()), remedy)
    return weights
