"""What a sink does to the values: drains, no-operations and broadcasts; massive activations of the residual stream.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, V value width, E model width, L tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_positive, check_shape, require

__all__ = ["is_dormant", "massive_activations", "matrix_entropy", "sink_kind", "stable_rank", "value_drain"]

SinkKind = Literal["none", "no-operation", "broadcast", "other"]

#: A key is a sink if this share of the queries gives it at least half of their weight.
SINK_QUERIES = 0.9
#: A sink whose drain is at most this part of the mean is a no-operation.
NO_OPERATION_DRAIN = 0.2
#: A sink whose drain is at least this part of the mean broadcasts, if the head's output has about one direction:
BROADCAST_DRAIN, ONE_DIRECTION = 0.5, 1.5
#: A head that adds less than this part of its layer's mean is dormant.
DORMANT = 0.1
#: Tokens whose drains are computed at once.
DRAIN_BLOCK = 8192


def value_drain(value: Tensor, output_weight: Tensor) -> Tensor:
    """Compute ||W_O^h v_j||, the size of what a query that attends key j alone gets from head h.

    Args:
        value: (B, Hk, K, V).
        output_weight: (E, H V), the weight of the output projection; Hk divides H.

    Returns:
        (B, H, K) in units of the residual stream; never materialises W_O v.

    Source:
        Value drain: Guo et al. 2024 (arXiv 2410.13835); Gu et al. 2024 (arXiv 2410.10781).

    Example:
        >>> value_drain(torch.ones(1, 1, 1, 2), torch.eye(2))
        tensor([[[1.4142]]])
    """
    check_floating("value_drain", "value", value)
    require(value.dim() == 4, "value_drain", "value", "have shape (B, heads, K, V)", value, "Split the heads first")
    width, kv_heads = value.shape[-1], value.shape[1]
    heads = output_weight.shape[-1] // width
    fits = output_weight.dim() == 2 and heads * width == output_weight.shape[-1] and heads > 0 and heads % kv_heads == 0
    rule = f"have shape (E, multiple of {kv_heads * width})"
    require(fits, "value_drain", "output_weight", rule, output_weight, "Transpose it if it is stored the other way")
    dtype = torch.promote_types(value.dtype, torch.float32)
    by_head = output_weight.to(dtype).unflatten(-1, (heads, width)).movedim(1, 0)  # (H, E, V)
    gram = (by_head.mT @ by_head).unflatten(0, (kv_heads, heads // kv_heads))  # (Hk, G, V, V)
    parts = []
    for block in value.split(DRAIN_BLOCK, dim=2):
        wide = block.to(dtype).unsqueeze(2)
        parts.append(((wide @ gram) * wide).sum(-1).clamp(min=0).sqrt().flatten(1, 2))
    return torch.cat(parts, dim=-1)


def stable_rank(output: Tensor) -> Tensor:
    """Compute ||O||_F^2 / ||O||_2^2 of a head's output: one if all queries get multiples of one vector.

    Args:
        output: (..., Q, V).

    Returns:
        (...,) dimensionless, in [1, min(Q, V)]; NaN for zero output.

    Example:
        >>> stable_rank(torch.eye(3)).round(decimals=3)
        tensor(3.)
    """
    singular = torch.linalg.svdvals(check_floating("stable_rank", "output", output).double())
    return (singular.square().sum(-1) / singular[..., 0].square()).to(output.dtype)


def sink_kind(attention_weights: Tensor, drain: Tensor, output: Tensor, *, key: int = 0) -> list[list[SinkKind]]:
    """Classify the sink at ``key`` of every head by what it adds to the residual stream.

    A sink is a key to which 90% of the queries give at least half their mass. It is a no-operation if its drain is at
    most 0.2 of the mean over keys, a broadcast if it is at least 0.5 and the output's stable rank is at most 1.5.

    Args:
        attention_weights: (B, H, Q, K), rows sum to one.
        drain: (B, H, K) from :func:`value_drain`.
        output: (B, H, Q, V) of the head, before the output projection.
        key: Index of the candidate.

    Returns:
        B lists of H words: "none", "no-operation", "broadcast" or "other".

    Source:
        Active and dormant heads: Guo et al. 2024 (arXiv 2410.13835); the thresholds are conventions.

    Example:
        >>> weights = torch.tensor([[1.0, 0.0], [1.0, 0.0]])[None, None]
        >>> sink_kind(weights, torch.tensor([[[0.0, 1.0]]]), torch.zeros(1, 1, 2, 3))
        [['no-operation']]
    """
    batch, heads, queries, keys = attention_weights.shape
    check_shape("sink_kind", "drain", drain, (batch, heads, keys), "See value_drain")
    check_shape("sink_kind", "output", output, (batch, heads, queries, None), "Pass the head's output")
    is_sink = (attention_weights[..., key] >= 0.5).float().mean(-1) >= SINK_QUERIES
    relative = drain[..., key] / drain.mean(-1)
    rank = stable_rank(output)

    def kind(b: int, h: int) -> SinkKind:
        if not is_sink[b, h]:
            return "none"
        if relative[b, h] <= NO_OPERATION_DRAIN:
            return "no-operation"
        return "broadcast" if relative[b, h] >= BROADCAST_DRAIN and rank[b, h] <= ONE_DIRECTION else "other"

    return [[kind(b, h) for h in range(heads)] for b in range(batch)]


def is_dormant(output: Tensor, *, threshold: float = DORMANT) -> Tensor:
    """Whether a head adds little to the residual stream compared with the other heads of its layer.

    Args:
        output: (B, H, Q, E) what each head adds to the residual stream, or anything of that size.
        threshold: A head is dormant if its mean norm is below this part of the layer's mean, in (0, 1).

    Returns:
        (B, H) boolean; active heads are false.

    Source:
        Active and dormant heads: Guo et al. 2024 (arXiv 2410.13835); the threshold is ours.

    Example:
        >>> is_dormant(torch.tensor([1.0, 0.01])[None, :, None, None])
        tensor([[False,  True]])
    """
    check_positive("is_dormant", "threshold", threshold)
    norm = check_floating("is_dormant", "output", output).norm(dim=-1).mean(-1)
    return norm < threshold * norm.mean(-1, keepdim=True)


def massive_activations(hidden: Tensor, *, size: float = 100.0, ratio: float = 1000.0) -> Tensor:
    """Find entries with |x| > ``size`` and |x| > ``ratio`` times the median |x| of their sequence.

    Args:
        hidden: (..., L, E) residual stream.
        size: Absolute threshold.
        ratio: Threshold relative to the median.

    Returns:
        (n, number of axes) indices of those entries.

    Source:
        Sun et al. 2024 (arXiv 2402.17762).

    Example:
        >>> massive_activations(torch.tensor([[0.1, 2000.0], [0.1, 0.1]]))
        tensor([[0, 1]])
    """
    magnitude = check_floating("massive_activations", "hidden", hidden).abs()
    require(hidden.dim() >= 2, "massive_activations", "hidden", "have shape (..., L, E)", hidden, "Add a token axis")
    median = magnitude.flatten(-2).median(-1).values[..., None, None]
    return ((magnitude > size) & (magnitude > ratio * median)).nonzero()


def matrix_entropy(hidden: Tensor) -> Tensor:
    """Compute -sum_k s_k ln s_k of the eigenvalues of X X^T scaled to sum one: how many directions tokens use.

    Args:
        hidden: (..., L, E) representations of the tokens of a sequence.

    Returns:
        (...,) nats, in [0, ln min(L, E)].

    Source:
        Matrix-based entropy: Giraldo et al. 2014; Skean et al. 2025 (arXiv 2502.02013).

    Example:
        >>> matrix_entropy(torch.eye(3)).round(decimals=4)
        tensor(1.0986)
    """
    squares = torch.linalg.svdvals(check_floating("matrix_entropy", "hidden", hidden).double()).square()
    share = squares / squares.sum(-1, keepdim=True)
    return -torch.special.xlogy(share, share).sum(-1).to(hidden.dtype)
