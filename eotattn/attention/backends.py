"""Backends: objects that say whether they can serve a call, and serve it.

Legend: B batch, H query heads, Q queries, K keys, V value width, W kernel width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from eotattn.attention import near_far, rebased
from eotattn.attention.call import AttentionCall
from eotattn.attention.measured import preference
from eotattn.attention.operands import call_terms, operands, plan_of
from eotattn.attention.row_constants import row_constants
from eotattn.attention.token_bias import is_learned
from eotattn.compat import is_transformed
from eotattn.kernels import flex, local, log_sum_exp, packed, reference, sdpa, varlen
from eotattn.priors import LogPrior
from eotattn.priors.flex_form import ScoreMod, biased_score
from eotattn.priors.reading import expand_heads

__all__ = ["BACKENDS", "Backend", "Served", "answer", "choose"]


class Served(NamedTuple):
    """What a backend makes of a call.

    Args:
        output: (B, H, Q, V).
        weights: (B, H, Q, K), where the backend has them.
        lse: (B, H, Q) nats, where the call asks for it.
    """

    output: Tensor
    weights: Tensor | None = None
    lse: Tensor | None = None


class Backend(Protocol):
    """What can serve attention calls."""

    #: How users ask for it.
    name: str

    def refusal(self, call: AttentionCall) -> str | None:
        """Why it cannot serve the call, or ``None`` if it can."""

    def run(self, call: AttentionCall) -> Served:
        """Serve the call."""


class Reference:
    """Dense tensor operations: the definition, for any prior, with weights."""

    name = "reference"

    def refusal(self, call: AttentionCall) -> str | None:
        """Never, but where it would miss the keys of other processes."""
        return STOCK_ONLY if call.is_shared else None

    def run(self, call: AttentionCall) -> Served:
        """Output, weights and log-sum-exp."""
        mask, log_prior = call.dense_mask(), call.log_prior(torch.promote_types(call.query.dtype, torch.float32))
        if mask is not None and mask.dtype != torch.bool:
            log_prior, mask = mask if log_prior is None else log_prior + mask, None
        options: dict[str, Any] = {"scale": call.scale, "dropout_p": call.dropout_p}
        return Served(*reference.attend(call.query, call.key, call.value, log_prior=log_prior, mask=mask, **options))


class Sdpa:
    """Stock fused calls with the prior in lanes: one, or one a document, or one over blocks of a window."""

    name = "sdpa"

    def refusal(self, call: AttentionCall) -> str | None:
        """Why it cannot serve the call, or ``None``."""
        mask = call.masks.dense
        if call.needs_lse:
            if mask is not None and mask.requires_grad:
                return "the log-sum-exp of fused calls has no gradient in attn_mask; use backend='reference'"
            if _is_transformed(call):
                return NO_TRANSFORMS
        return _without_lanes(call) or (None if mask is None else _rounds_mask(call))

    def run(self, call: AttentionCall) -> Served:
        """Output, and the log-sum-exp where it is asked for."""
        if not call.needs_lse:
            output = self._attend(call, partial(sdpa.attend, dropout_p=call.dropout_p))
            return Served(_without_empty_rows(call, output))
        if call.dropout_p:  # the operators that return both drop nothing
            output = self.run(replace(call, return_lse=False, sinks=None)).output
            return Served(output, lse=self.run(replace(call, dropout_p=0.0)).lse)
        output, lse = self._attend(call, log_sum_exp.attend)
        constants = row_constants(call)
        if constants is not None:
            lse = (lse.double() + constants).to(lse.dtype)
        return Served(_without_empty_rows(call, output), lse=_of_rows_with_keys(call, lse, float("-inf")))

    def _attend(self, call: AttentionCall, fused: Callable[..., Any]) -> Any:
        """What ``fused`` makes of the whole call, or of its blocks or documents side by side."""
        query, key, value = operands(call)
        shared: dict[str, Any] = {"scale": call.scale}
        masks, band = call.masks, call.masks.band
        window = None if band is None else band.window
        if masks.dense is not None:
            return fused(query, key, value, mask=_fused_mask(call), **shared)
        if masks.documents is not None and torch.compiler.is_compiling():  # one graph serves all packings
            batch, length, device = query.shape[0], query.shape[2], query.device
            allowed = masks.documents.mask(batch, length, device)
            allowed = allowed if band is None else allowed & band.mask(length, length, device)
            return fused(query, key, value, mask=allowed, **shared)
        if masks.documents is not None:
            shared |= {"lengths": masks.documents.lengths, "is_causal": band is not None, "window": window}
            return packed.attend(query, key, value, fused=fused, **shared)
        if band is not None and window is not None:
            return local.attend(query, key, value, window=window, offset=band.offset, fused=fused, **shared)
        if band is not None and band.is_triangle:  # a branch, since graphs want no symbol as an argument
            return fused(query, key, value, mask=None, is_causal=True, **shared)
        mask = None if band is None else band.mask(query.shape[2], key.shape[2], query.device)
        return fused(query, key, value, mask=mask, is_causal=False, **shared)


class _InStockCalls:
    """Calls that are cut into stock calls, whose outputs merge by log-sum-exps.

    Args:
        name: That users ask for.
        room: The module that cuts: ``near_far`` (near keys by blocks, far keys in stock calls, for a prior that is a
            constant, or has lanes, far away) or ``rebased`` (rectangles whose lanes and biases count from close by).
    """

    def __init__(self, name: str, room: Any) -> None:
        self.name, self._room = name, room

    def refusal(self, call: AttentionCall) -> str | None:
        """Why it cannot serve the call, or ``None``."""
        if call.return_weights or call.is_shared:
            return NO_WEIGHTS if call.return_weights else STOCK_ONLY
        reason: str | None = NO_TRANSFORMS if _is_transformed(call) else self._room.refusal(call)
        return reason

    def run(self, call: AttentionCall) -> Served:
        """Output and log-sum-exp."""
        output, lse = self._room.attend(call, Sdpa().run)
        return Served(_without_empty_rows(call, output), lse=_of_rows_with_keys(call, lse, float("-inf")))


class Varlen:
    """PyTorch's variable-length kernel with the prior in lanes: no mask, whatever the pattern; GPU, 16 bits."""

    name = "varlen"

    def refusal(self, call: AttentionCall) -> str | None:
        """Why it cannot serve the call, or ``None``."""
        reason = STOCK_ONLY if call.is_shared else varlen.refusal(call.query, dropout_p=call.dropout_p)
        reason = reason or _without_lanes(call)
        if reason is None and call.masks.dense is not None:
            reason = "it takes no mask of pairs; say is_causal, window or documents, with positions as ranges"
        if reason is None and call.needs_lse:
            reason = "its log-sum-exp has no gradient; use backend='sdpa'"
        return reason or varlen.width_refusal(self.width(call))

    def width(self, call: AttentionCall) -> int:
        """Head width that the call needs."""
        terms = call_terms(call)
        num_lanes = plan_of(call, terms)[0].num_lanes if terms else 0
        num_lanes += (call.masks.padding is not None) + is_learned(call.query_bias)
        return max(call.query.shape[-1] + num_lanes, call.value.shape[-1])

    def run(self, call: AttentionCall) -> Served:
        """Output alone."""
        query, key, value = operands(call)
        band, documents = call.masks.band, call.masks.documents
        pattern: dict[str, Any] = {"is_causal": band is not None, "scale": call.scale}
        pattern["window"] = None if band is None else band.window
        if documents is not None:
            pattern |= {"offsets": documents.offsets(query.device), "longest": documents.bound(query.shape[2])}
        elif band is not None:
            seen = band.offset + query.shape[2]
            key, value = key[:, :, :seen], value[:, :, :seen]
        return Served(_without_empty_rows(call, varlen.attend(query, key, value, **pattern)))


class Flex:
    """FlexAttention: any prior as a score modification, compiled; GPU."""

    name = "flex"

    def refusal(self, call: AttentionCall) -> str | None:
        """Why it cannot serve the call, or ``None``."""
        if call.return_weights or call.is_shared:
            return NO_WEIGHTS if call.return_weights else STOCK_ONLY
        if call.prior is not None and call.prior.num_samples is not None:
            return "its score modification of a prior reads no sample; use 'reference'"
        if call.query_gains:
            return "its score modification has no factors of a query's own; use 'sdpa'"
        learned = call.prior is not None and torch.is_grad_enabled() and _learns_in_lanes(call.prior)
        learned = learned or is_learned(call.key_bias) or is_learned(call.query_bias)
        biased = call.masks.dense if call.masks.key_bias is None else call.masks.key_bias
        return flex.refusal(call.query, mask=biased, dropout_p=call.dropout_p, learned=learned)

    def run(self, call: AttentionCall) -> Served:
        """Output, and the log-sum-exp where it is asked for."""
        masks, pattern = call.masks, None
        if any(mask is not None for mask in (masks.dense, masks.padding, masks.band, masks.documents)):
            own, of_caller = masks.documents is not None, masks.padding is not None or masks.dense is not None
            pattern = flex.Pattern(
                _visible(call),
                by_sample=own or of_caller,
                by_head=masks.dense is not None,
                name=None if of_caller else (masks.band, masks.documents),
            )
        content = (call.query, call.key, call.value)
        options: dict[str, Any] = {"score_mod": self.score_mod(call), "pattern": pattern, "with_lse": call.needs_lse}
        output, lse = flex.attend(*content, scale=call.scale, **options)
        return Served(output, lse=lse)

    def score_mod(self, call: AttentionCall) -> ScoreMod | None:
        """The log-prior and what tokens add to it as a score modification."""
        modified = None
        if call.prior is not None:
            modified = call.prior.score_mod(call.query_positions.tensor, call.key_positions.tensor)
        heads, of_keys = call.query.shape[1], call.key_bias
        of_keys = of_keys if of_keys is None or of_keys.shape[1] == 1 else expand_heads(of_keys, heads)
        return biased_score(modified, of_keys, call.query_bias)


#: Backends by the names that users ask for.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Sdpa(),
        _InStockCalls("near_far", near_far),
        _InStockCalls("rebased", rebased),
        Varlen(),
        Flex(),
        Reference(),
    )
}
NO_TRANSFORMS = "the log-sum-exp of fused calls has no gradient under torch.func; use backend='reference'"
STOCK_ONLY = "context_parallel shares stock calls between processes; use backend='sdpa'"
NO_WEIGHTS = "fused kernels do not return weights; use backend='reference'"


def answer(call: AttentionCall, backend: Backend) -> Served:
    """What ``backend`` makes of the call, its sinks joined."""
    served = backend.run(call)
    if call.sinks is None:
        return served
    assert served.lse is not None, "refusal() comes first"
    options: dict[str, Any] = {"scale": call.scale, "dropout_p": call.dropout_p}
    output, lse, share = call.sinks.join(served.output, served.lse, call.query, **options)
    weights = None if served.weights is None else served.weights * share.unsqueeze(-1)
    return Served(output, weights, lse)


def choose(call: AttentionCall) -> Backend:
    """The first that can serve the call, fastest first as measured; ``rebased`` where one call is too coarse."""
    if call.return_weights:
        return BACKENDS["reference"]
    if rebased.is_worth_it(call) and BACKENDS["rebased"].refusal(call) is None:
        return BACKENDS["rebased"]
    names = preference(call.masks, call.query.shape[2], has_prior=call.has_log_prior)
    for name in names:
        if BACKENDS[name].refusal(call) is None:
            return BACKENDS[name]
    raise AssertionError("the reference serves every call")


def _without_lanes(call: AttentionCall) -> str | None:
    """Why lanes cannot serve the call, or ``None``."""
    if call.return_weights:
        return NO_WEIGHTS
    if call.prior is not None and not call.prior.has_lanes:
        return "this prior has no lanes; use backend='near_far', 'reference' or 'flex'"
    return None


def _is_transformed(call: AttentionCall) -> bool:
    """Whether a gradient is wanted within a function transform, as those of :mod:`torch.func` are."""
    return not torch.compiler.is_compiling() and is_transformed() and call.follows_gradients


def _rounds_mask(call: AttentionCall) -> str | None:
    """Why a floating mask of pairs would lose digits, or ``None``."""
    mask = call.masks.dense
    if mask is None or mask.dtype in (torch.bool, call.query.dtype) or call.query.dtype == torch.float64:
        return None
    if call.query.device.type == "cpu" and mask.dtype == torch.float32:
        return None  # the CPU's kernel adds it as it is
    if _holds_exactly(mask, call.query.dtype):
        return None
    return f"its mask would be rounded from {mask.dtype} to {call.query.dtype}; cast attn_mask yourself to accept that"


def _holds_exactly(mask: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` holds every number of the mask; waits for the device, and is not asked in graphs."""
    if torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return bool((mask.to(dtype).to(mask.dtype) == mask).all())


def _fused_mask(call: AttentionCall) -> Tensor | None:
    """Masks of pairs as a fused call takes them."""
    mask, dtype = call.masks.dense, call.query.dtype
    assert mask is not None
    if call.masks.padding is not None:
        seen = ~call.masks.padding[:, None, None, :]
        mask = mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, float("-inf"))
    keeps = mask.dtype in (torch.bool, dtype) or (mask.dtype == torch.float32 and mask.device.type == "cpu")
    return mask if keeps and dtype != torch.float64 else mask if mask.dtype == torch.bool else mask.to(dtype)


def _without_empty_rows(call: AttentionCall, output: Tensor) -> Tensor:
    """Output (B, H, Q, V) with zeros where a query has no admissible key."""
    width = call.value.shape[-1]
    output = output if output.shape[-1] == width else output[..., :width]
    masks = call.masks
    return output if masks.padding is None and masks.key_bias is None else _of_rows_with_keys(call, output, 0.0)


def _of_rows_with_keys(call: AttentionCall, rows: Tensor, otherwise: float) -> Tensor:
    """Rows (B, H, Q, ...) and ``otherwise`` where a query has no admissible key."""
    if call.cache is not None and not call.cache.counts_on_host and call.masks.key_bias is None:
        return rows  # new tokens are not padding there, so that each sees itself
    has_keys = call.masks.has_keys(call.query.shape[2])
    if has_keys is None:
        return rows
    return rows.masked_fill(~(has_keys.unsqueeze(-1) if rows.dim() == 4 else has_keys), otherwise)


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
