"""Backends: which of them can serve a call, and how each is called.

Legend: B batch, H query heads, Q queries, K keys, V value width, W kernel width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eotattn.attention.call import AttentionCall
from eotattn.attention.joined import joined
from eotattn.attention.measured import preference
from eotattn.kernels import flex, local, packed, reference, sdpa, varlen
from eotattn.priors import LogPrior

__all__ = ["BACKENDS", "choose", "refusal", "run"]

BACKENDS = ("sdpa", "varlen", "flex", "reference")


def choose(call: AttentionCall) -> str:
    """The first backend that can serve the call, fastest first as measured."""
    names = preference(call.masks, call.query.shape[2], has_prior=call.prior is not None)
    return next(name for name in names if refusal(name, call) is None)


def refusal(name: str, call: AttentionCall) -> str | None:
    """Why backend ``name`` cannot serve the call, or ``None`` if it can."""
    if name == "reference":
        return None
    if call.return_weights:
        return "fused kernels do not return weights; use backend='reference'"
    if name == "flex":
        learned = call.prior is not None and torch.is_grad_enabled() and _learns_in_lanes(call.prior)
        return flex.refusal(call.query, mask=call.masks.dense, dropout_p=call.dropout_p, learned=learned)
    if call.prior is not None and not call.prior.has_lanes:
        return "this prior has no lanes; use backend='reference' or 'flex'"
    if name == "varlen":
        if call.masks.dense is not None:
            return "it takes no mask of pairs; say is_causal, window or documents, with positions as ranges"
        num_lanes = 0 if call.prior is None else call.prior.num_lanes(call.query.dtype, call.key.shape[1])
        num_lanes += call.masks.padding is not None
        width = max(call.query.shape[-1] + num_lanes, call.value.shape[-1])
        return varlen.refusal(call.query, width=width, dropout_p=call.dropout_p)
    return None


def run(name: str, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Serve the call: output (B, H, Q, V), and weights (B, H, Q, K) where the backend has them."""
    if name == "reference":
        return _through_dense(call)
    if name == "flex":
        return _through_flex(call), None
    query, key, value = _operands(call)
    attend = _in_sequences if name == "varlen" else _in_one_mask
    output = attend(call, query, key, value)[..., : call.value.shape[-1]]
    has_keys = call.masks.has_keys(call.query.shape[2])
    return (output if has_keys is None else output.masked_fill(~has_keys[:, None, :, None], 0.0)), None


def _operands(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key (B, H, L, W) with lanes beside their content, and values as wide as V or wider."""
    if call.cache is not None:
        stored = call.cache.operands(call.query, call.prior, scale=call.scale)
        if stored is not None:
            return stored
    pair = joined(call)
    if pair is not None:
        return (*pair, call.value)
    lanes = []
    if call.prior is not None:
        prior_lanes = call.prior.lanes(
            call.query_positions.tensor, call.key_positions.tensor, dtype=call.query.dtype, query_scale=1 / call.scale
        ).grouped(call.key.shape[1])
        lanes.append((prior_lanes.query, prior_lanes.key))
    if call.masks.padding is not None and call.masks.dense is None:
        # a lane keeps the call fused and needs no Q x K tensor
        lanes.append(sdpa.padding_lane(call.masks.padding, call.query.dtype, scale=call.scale))
    return (*sdpa.append_lanes(call.query, call.key, lanes), call.value)


def _in_one_mask(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Stock fused calls: one, or one a document, or one over blocks of a window."""
    shared: dict[str, Any] = {"scale": call.scale, "dropout_p": call.dropout_p}
    masks, band = call.masks, call.masks.band
    window = None if band is None else band.window
    if masks.documents is not None:
        lengths, is_causal = masks.documents.lengths, band is not None
        return packed.attend(query, key, value, lengths=lengths, is_causal=is_causal, window=window, **shared)
    if band is not None and window is not None:
        return local.attend(query, key, value, window=window, offset=band.offset, **shared)
    mask = None
    if masks.dense is not None:
        mask = call.dense_mask()
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype)
    elif band is not None and not band.is_triangle:
        mask = band.mask(query.shape[2], key.shape[2], query.device)
    return sdpa.attend(query, key, value, mask=mask, is_causal=masks.triangle, **shared)


def _in_sequences(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The variable-length kernel: no mask, whatever the pattern."""
    band, documents = call.masks.band, call.masks.documents
    pattern: dict[str, Any] = {"is_causal": band is not None, "scale": call.scale}
    pattern["window"] = None if band is None else band.window
    if documents is not None:
        offsets = documents.offsets(query.device)
        return varlen.attend(query, key, value, offsets=offsets, longest=documents.longest, **pattern)
    if band is not None:
        seen = band.offset + query.shape[2]
        key, value = key[:, :, :seen], value[:, :, :seen]
    return varlen.attend(query, key, value, **pattern)


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


def _through_flex(call: AttentionCall) -> Tensor:
    score_mod = None
    if call.prior is not None:
        score_mod = call.prior.score_mod(call.query_positions.tensor, call.key_positions.tensor)
    masks, pattern = call.masks, None
    if any(mask is not None for mask in (masks.dense, masks.padding, masks.band, masks.documents)):
        own, of_caller = masks.documents is not None, masks.padding is not None or masks.dense is not None
        pattern = flex.Pattern(
            _visible(call),
            by_sample=own or of_caller,
            by_head=masks.dense is not None,
            name=None if of_caller else (masks.band, masks.documents),
        )
    return flex.attend(call.query, call.key, call.value, scale=call.scale, score_mod=score_mod, pattern=pattern)


def _visible(call: AttentionCall) -> Callable[..., Tensor]:
    """All masks as a function (batch, head, query index, key index) -> boolean."""
    masks = call.masks
    batch, heads, queries, keys = *call.query.shape[:3], call.key.shape[2]
    dense = None if masks.dense is None else masks.dense.expand(batch, heads, queries, keys)
    ids = None if masks.documents is None else masks.documents.ids(batch, keys, call.query.device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = q >= 0
        if masks.band is not None:
            lag = q + masks.band.offset - k
            allowed = lag >= 0 if masks.band.window is None else (lag >= 0) & (lag < masks.band.window)
        if masks.padding is not None:
            allowed = allowed & ~masks.padding[b, k]
        if ids is not None:
            allowed = allowed & (ids[b, q] == ids[b, k])
        return allowed if dense is None else allowed & dense[b, h, q, k]

    return visible


def _learns_in_lanes(prior: LogPrior) -> bool:
    """Whether a part of the prior that has lanes is being trained."""
    parts = [part for part in prior.modules() if isinstance(part, LogPrior) and part.has_lanes]
    return any(parameter.requires_grad for part in parts for parameter in part.parameters())
