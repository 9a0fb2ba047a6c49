"""The certificate of attention weights as a model computed them, without its help: values that are unit vectors.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, V value width, r rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.checks import require
from eotattn.integrations.captured_call import CapturedCall

__all__ = ["CERTIFIED_KEYS", "call_certificate", "row_certificate"]

#: Longer calls are not certified: reading the weights off costs K / V more calls.
CERTIFIED_KEYS = 1024


def row_certificate(weights: Tensor, logits: Tensor) -> Tensor:
    """Compute the duality gap of computed rows, lse_i - sum_j p_ij z_ij + sum_j p_ij ln p_ij = KL(p_i || softmax(z_i)).

    Zero exactly for the true weights of the entropic problem; the total variation error is at most sqrt(gap / 2). Where
    rounding leaves a row that does not sum to one, it is the divergence of unnormalised measures, which is not negative
    either.

    Args:
        weights: (..., Q, K) computed weights, not negative, rows sum to one up to rounding.
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
    rule = f"have the shape {tuple(weights.shape)} of the weights"
    require(logits.shape == weights.shape, "row_certificate", "logits", rule, logits, "Match them")
    wide, p = logits.double(), weights.double()
    total, reward = p.sum(-1), torch.where(p > 0, p * wide, 0.0).sum(-1)
    gap = total * torch.logsumexp(wide, -1) - reward + torch.special.xlogy(p, p).sum(-1) + (1 - total)
    return gap.to(weights.dtype)


def call_certificate(call: CapturedCall, *, rows: int) -> Tensor | None:
    """Compute the duality gap of the last rows of a call, in the weights that the model's own kernel makes.

    The gap is KL(computed weights || softmax of the logits in float64), nats; see
    :func:`row_certificate`. An explicit sink is one more outcome.

    Args:
        call: A call that can be repeated with other values.
        rows: How many queries.

    Returns:
        (B, H) float64, the largest gap of those rows; NaN where they are all padding. ``None`` where the call cannot be
        repeated or has more than :data:`CERTIFIED_KEYS` keys.
    """
    if call.attend is None or call.key.shape[2] > CERTIFIED_KEYS:
        return None
    tail = call.tail(rows)
    weights, logits = _computed_weights(call, tail.query.shape[2]).double(), _logits(tail)
    if tail.sink_logits is not None:
        sink = tail.sink_logits.double().unsqueeze(-1).expand(*logits.shape[:3], 1)
        rest = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
        weights, logits = torch.cat([weights, rest], -1), torch.cat([logits, sink], -1)
    gaps = row_certificate(weights.nan_to_num(), logits)
    seen = (logits > -torch.inf).any(-1)
    if tail.counted is not None:
        seen = seen & tail.counted[:, None]
    worst = torch.where(seen, gaps, -torch.inf).amax(-1)
    return torch.where(worst > -torch.inf, worst, torch.nan).cpu()


def _computed_weights(call: CapturedCall, rows: int) -> Tensor:
    """(B, H, r, K): attention to unit vectors returns its weights, V keys a time."""
    assert call.attend is not None
    keys, width = call.value.shape[2:]
    parts = []
    for start in range(0, keys, width):
        count = min(width, keys - start)
        unit = torch.zeros_like(call.value)
        unit[:, :, start : start + count, :count] = torch.eye(count, dtype=unit.dtype, device=unit.device)
        parts.append(call.attend(unit)[:, :, -rows:, :count])
    return torch.cat(parts, -1)


def _logits(tail: CapturedCall) -> Tensor:
    """(B, H, r, K) float64; -inf at inadmissible keys."""
    source = tail.source(torch.float64)
    rows, keys = source.shape[2:]
    block = source.block(0, rows)
    logits = block.content if block.prior is None else block.content + block.prior
    if block.admissible is not None:
        logits = logits.masked_fill(~block.admissible, -torch.inf)
    full = logits.new_full((*logits.shape[:3], keys), -torch.inf)
    full[..., block.first_key : block.first_key + logits.shape[-1]] = logits
    return full
