"""What one block of logits says about its rows.

Legend: B batch, H query heads, r rows and k keys of a block, V value width, N chosen keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eotattn.attention.statistics.score_rows import ScoreBlock

__all__ = ["block_statistics", "sink_of_rows"]


def block_statistics(
    block: ScoreBlock, chosen: Tensor, sink: Tensor | None, value: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weights of a block and the statistics of its rows.

    Args:
        block: Logits of some rows.
        chosen: (B, N) indices of the chosen keys among all keys; the first one is the margin's.
        sink: (H,), or broadcastable to (B, H, Q): logit of an explicit sink, nats, or ``None``.
        value: (B, Hk, K, V), or ``None``.

    Returns:
        Weights (B, H, r, k), rows sum to one less the explicit sink's mass, or to zero where no key is admissible; and
        the row fields of :class:`eotattn.attention.statistics.streaming.AttentionStatistics` by name.
    """
    sink = None if sink is None else sink_of_rows(sink, block.start, block.stop)
    content, prior, seen = block.content, block.prior, block.admissible
    num_keys = _num_keys(content, seen)
    has = num_keys > 0
    hidden = _hidden(seen, content.dtype)
    logits = content if prior is None else content + prior
    logits = logits.clone() if hidden is None else logits + hidden
    top = logits.amax(-1)
    weights, lse, key_lse, sink_mass = _normalised(logits, top, has, sink)
    score = _products(weights, content)
    logit = score if prior is None else score + _products(weights, prior)
    if sink is not None:
        logit = logit + sink_mass * sink
    highest = top if prior is None else _shifted(content, hidden, 1).amax(-1)
    own = chosen - block.first_key
    rows = {
        "log_sum_exp": lse,
        "key_log_sum_exp": key_lse,
        "entropy": torch.where(has, (lse - logit).clamp(min=0), 0.0),
        "participation": _products(weights, weights) + sink_mass.square(),
        "num_keys": num_keys,
        "score_min": torch.where(has, _shifted(content, hidden, -1).amin(-1), 0.0),
        "score_max": torch.where(has, highest, 0.0),
        "expected_score": score,
        "prior_log_sum_exp": _prior_lse(prior, seen, num_keys, content),
        "key_mass": _gather(weights, own, 0.0),
        "explicit_sink_mass": sink_mass,
        **_margins(logits, content, prior, own[:, :1]),
    }
    if value is not None:
        rows["output"] = _output(weights, value[:, :, block.first_key : block.first_key + content.shape[-1]])
    return weights, rows


def sink_of_rows(sink: Tensor, start: int, stop: int | None = None) -> Tensor:
    """(B or 1, H, stop - start or 1): an explicit sink's logits of some rows."""
    if sink.dim() == 1:
        return sink[None, :, None]
    return sink if sink.shape[-1] == 1 else sink[..., start:stop]


def _hidden(seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Zero at admissible keys, -inf elsewhere: adding is several times faster than filling where heads share a mask."""
    return None if seen is None else torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -math.inf)


def _shifted(content: Tensor, hidden: Tensor | None, sign: int) -> Tensor:
    """Content, and -inf (sign 1) or inf (sign -1) at inadmissible keys."""
    return content if hidden is None else torch.add(content, hidden, alpha=sign)


def _products(weights: Tensor, values: Tensor) -> Tensor:
    """(B, H, r) sum of products over the keys."""
    return torch.einsum("bhrk,bhrk->bhr", weights, values.expand(weights.shape))


def _normalised(logits: Tensor, top: Tensor, has: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, log-sum-exp with and without the explicit sink, and its mass; zero and -inf without keys.

    The sum over keys is kept apart: one less the sink's mass would lose what little a strong sink leaves to them.
    """
    peak = torch.where(has, top, 0.0)
    if sink is not None:
        peak = torch.maximum(peak, sink)
    weights = torch.exp(logits - peak.unsqueeze(-1))
    keys = weights.sum(-1)
    sink_part = torch.zeros_like(peak) if sink is None else torch.exp(sink - peak)
    safe = torch.where(has, keys + sink_part, 1.0)
    weights /= safe.unsqueeze(-1)
    lse, key_lse = (
        torch.where(has, peak + total.clamp(min=torch.finfo(total.dtype).tiny).log(), -math.inf)
        for total in (safe, keys)
    )
    return weights, lse, key_lse, torch.where(has, sink_part / safe, 0.0)


def _num_keys(content: Tensor, seen: Tensor | None) -> Tensor:
    """(B, H, r) admissible keys, in the dtype of the scores."""
    if seen is None:
        return content.new_full(content.shape[:-1], content.shape[-1])
    counts = seen.sum(-1) if seen.shape[-1] > 1 else seen.squeeze(-1) * content.shape[-1]
    return counts.to(content.dtype).expand(content.shape[:-1])


def _prior_lse(prior: Tensor | None, seen: Tensor | None, num_keys: Tensor, content: Tensor) -> Tensor:
    if prior is None:
        return num_keys.clamp(min=1).log()
    full = prior if seen is None else torch.where(seen, prior, -math.inf)
    full = full.expand(torch.broadcast_shapes(full.shape, (1, 1, 1, content.shape[-1])))
    lse = torch.logsumexp(full, -1).expand(content.shape[:-1])
    return torch.where(num_keys > 0, lse, 0.0)


def _gather(values: Tensor, index: Tensor, outside: float) -> Tensor:
    """(B, H, r, N) entries at key ``index`` (B, N); ``outside`` where the block lacks the key."""
    inside = (index >= 0) & (index < values.shape[-1])
    at = index.clamp(0, values.shape[-1] - 1)[:, None, None, :].expand(*values.shape[:3], -1)
    return torch.where(inside[:, None, None, :], values.gather(-1, at), outside)


def _margins(logits: Tensor, content: Tensor, prior: Tensor | None, index: Tensor) -> dict[str, Tensor]:
    """z_j* minus the largest other logit, split at that competitor. Overwrites ``logits``."""
    own = _gather(logits, index, -math.inf)
    at = index.clamp(0, logits.shape[-1] - 1)[:, None, None, :].expand(*logits.shape[:3], 1)
    if logits.shape[-1] > 1:
        logits.scatter_(-1, at, -math.inf)
    if prior is None:
        best = logits.amax(-1, keepdim=True)
        content_part, prior_part = own - best, torch.zeros_like(best)
    else:
        best, competitor = logits.max(-1, keepdim=True)
        full = prior.expand(content.shape)
        content_part, prior_part = (one.gather(-1, at) - one.gather(-1, competitor) for one in (content, full))
    defined = (own > -math.inf) & (best > -math.inf) & (logits.shape[-1] > 1)
    parts = {"margin": own - best, "content_margin": content_part, "prior_margin": prior_part}
    return {name: torch.where(defined, part, math.nan).squeeze(-1) for name, part in parts.items()}


def _output(weights: Tensor, value: Tensor) -> Tensor:
    grouped = weights.unflatten(1, (value.shape[1], -1)).flatten(2, 3)
    return (grouped @ value).view(*weights.shape[:3], value.shape[-1])
