"""Join attention calls over disjoint sets of keys by their log-sum-exps.

Legend: B batch, H query heads, Q queries, V value width, N parts.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_same_device, check_shape, require

__all__ = ["combine", "merge"]

OWNER = "merge"


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join calls of the same queries over disjoint sets of keys into the call over all of them; exact.

    With l = logsumexp(l_1, ..., l_N) the output is sum_n exp(l_n - l) output_n. The result can be merged again, so
    shards of keys, e.g. of a ring of processes, may come one by one. Computed in float32 or finer, differentiable in
    all arguments.

    Args:
        outputs: N tensors (B, H, Q, V): outputs of :func:`prior_attention`.
        lses: N tensors (B, H, Q), nats: what it returned beside them with ``return_lse=True``; -inf at queries that
            have no key in a part, whose output and gradients there are then ignored.

    Returns:
        ``(output, lse)``: (B, H, Q, V) in the dtype of the outputs and (B, H, Q) in float32 or float64, nats. A query
        without any key has output zero and log-sum-exp -inf.

    Raises:
        ValueError: If the parts do not match.
        TypeError: If a part is no floating tensor.

    Example:
        >>> import torch
        >>> from eotattn import prior_attention
        >>> query, key = torch.ones(1, 1, 1, 4), torch.eye(4)[None, None]
        >>> parts = [prior_attention(query, some, some, return_lse=True) for some in (key[:, :, :1], key[:, :, 1:])]
        >>> merge(*zip(*parts))[0]
        tensor([[[[0.2500, 0.2500, 0.2500, 0.2500]]]])
    """
    _check(outputs, lses)
    output, lse, _ = combine(outputs, lses)
    return output.to(outputs[0].dtype), lse


def combine(outputs: Sequence[Tensor | None], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`merge` computes, in float32 or finer, and the share (N, B, H, Q) of every part.

    Args:
        outputs: (B, H, Q, V) each, or ``None`` for zero; the first is a tensor.
        lses: (B, H, Q) each.
    """
    parts = torch.stack(list(lses))
    parts = parts.to(torch.promote_types(parts.dtype, torch.float32))
    top = parts.detach().amax(0)
    has_keys = top != float("-inf")  # NaN is not "without keys": it must stay visible
    peak = torch.where(has_keys, top, 0.0)
    masses = torch.exp(parts - peak)
    total = torch.where(has_keys, masses.sum(0), 1.0)
    shares = masses / total
    weighted = [
        share.unsqueeze(-1) * torch.where(share.unsqueeze(-1) == 0, 0.0, output)
        for output, share in zip(outputs, shares, strict=True)
        if output is not None
    ]
    lse = torch.where(has_keys, peak + total.log(), float("-inf"))
    return reduce(operator.add, weighted), lse, shares


def _check(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    for name, parts in (("outputs", outputs), ("lses", lses)):
        are_parts = isinstance(parts, (list, tuple)) and len(parts) > 0
        require(are_parts, OWNER, name, "be a list of tensors, one a part", parts, "Pass a list", error=TypeError)
        for part in parts:
            check_floating(OWNER, name, part)
    have, want = len(lses), len(outputs)
    require(have == want, OWNER, "lses", f"be as many as the {want} outputs", have, "Pass one of each a part")
    first = outputs[0]
    require(first.dim() == 4, OWNER, "outputs", "have shape (B, H, Q, V)", first, "Split the heads first")
    for output, lse in zip(outputs, lses, strict=True):
        check_shape(OWNER, "outputs", output, tuple(first.shape), "Pass parts of the same queries")
        require(output.dtype == first.dtype, OWNER, "outputs", f"have one dtype, {first.dtype}", output, "Cast them")
        check_shape(OWNER, "lses", lse, tuple(first.shape[:3]), "Pass parts of the same queries")
        check_same_device(OWNER, ("outputs", first), outputs=output, lses=lse)
