"""Backends: which of them can serve a call, and how each is called.

Legend: B batch, H query heads, Q queries, K keys, P lanes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.attention.call import AttentionCall
from eotattn.attention.joined import joined
from eotattn.kernels import flex, reference, sdpa

__all__ = ["BACKENDS", "choose", "refusal", "run"]

#: In the order in which ``"auto"`` tries them.
BACKENDS = ("sdpa", "flex", "reference")


def choose(call: AttentionCall) -> str:
    """The first backend that can serve the call."""
    return next(name for name in BACKENDS if refusal(name, call) is None)


def refusal(name: str, call: AttentionCall) -> str | None:
    """Why backend ``name`` cannot serve the call, or ``None`` if it can."""
    if name == "reference":
        return None
    if call.return_weights:
        return "fused kernels do not return weights; use backend='reference'"
    if name == "flex":
        return flex.refusal(call.query, mask=call.masks.dense, dropout_p=call.dropout_p)
    if call.prior is not None and not call.prior.has_lanes:
        return "this prior has no lanes; use backend='reference' or 'flex'"
    return None


def run(name: str, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Serve the call: output (B, H, Q, V), and weights (B, H, Q, K) where the backend has them."""
    if name == "sdpa":
        return _through_lanes(call), None
    if name == "flex":
        return _through_flex(call), None
    return _through_dense(call)


def _through_dense(call: AttentionCall) -> tuple[Tensor, Tensor]:
    log_prior, mask = None, call.dense_mask()
    if call.prior is not None:
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        log_prior = call.prior.dense(call.query_positions.tensor, call.key_positions.tensor, dtype=dtype)
    if mask is not None and mask.dtype != torch.bool:
        log_prior, mask = mask if log_prior is None else log_prior + mask, None
    return reference.attend(
        call.query, call.key, call.value, scale=call.scale, log_prior=log_prior, mask=mask, dropout_p=call.dropout_p
    )


def _through_lanes(call: AttentionCall) -> Tensor:
    query, key, lanes = call.query, call.key, []
    operands = joined(call)
    if operands is not None:
        query, key = operands
    elif call.prior is not None:
        prior_lanes = call.prior.lanes(
            call.query_positions.tensor, call.key_positions.tensor, dtype=call.query.dtype, query_scale=1 / call.scale
        ).grouped(call.key.shape[1])
        lanes.append((prior_lanes.query, prior_lanes.key))
    masks, mask = call.masks, None
    if masks.dense is not None:
        mask = call.dense_mask()
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(call.query.dtype)
    elif masks.padding is not None and operands is None:  # a lane keeps the call fused and needs no Q x K tensor
        lanes.append(sdpa.padding_lane(masks.padding, call.query.dtype, scale=call.scale))
    output = sdpa.attend(
        query,
        key,
        call.value,
        scale=call.scale,
        lanes=lanes,
        mask=mask,
        is_causal=masks.triangle,
        dropout_p=call.dropout_p,
    )
    has_keys = masks.has_keys()
    return output if has_keys is None else output.masked_fill(~has_keys[:, None, :, None], 0.0)


def _through_flex(call: AttentionCall) -> Tensor:
    score_mod = None
    if call.prior is not None:
        score_mod = call.prior.score_mod(call.query_positions.tensor, call.key_positions.tensor)
    padded = call.masks.padding is not None
    return flex.attend(
        call.query,
        call.key,
        call.value,
        scale=call.scale,
        score_mod=score_mod,
        mask=call.dense_mask() if padded or not call.masks.triangle else None,
        is_causal=call.masks.triangle and not padded,
    )
