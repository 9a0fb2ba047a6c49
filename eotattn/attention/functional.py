"""The one functional door: attention with a prior.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, V value width, P lanes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.attention.masks import combine_masks, triangle_mask
from eotattn.attention.positions import Positions, causal_mask, resolve_positions
from eotattn.checks import (
    check_choice,
    check_floating,
    check_positive,
    check_same_device,
    check_shape,
    require,
)
from eotattn.kernels import flex, reference, sdpa
from eotattn.priors import LogPrior

__all__ = ["BACKENDS", "prior_attention"]

BACKENDS = ("auto", "sdpa", "flex", "reference")
OWNER = "prior_attention"


def prior_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    prior: LogPrior | None = None,
    query_positions: Tensor | range | None = None,
    key_positions: Tensor | range | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention_weights = softmax(scale * <query, key> + log_prior) and apply them to the values.

    This is the solution of the one-sided entropic transport problem with score scale * <query, key>, temperature one
    and the given log-prior. A query without admissible keys gets output, weights and gradients zero.

    Args:
        query: (B, H, Q, D), floating.
        key: (B, Hk, K, D); Hk divides H (grouped-query attention), no head is repeated in memory.
        value: (B, Hk, K, V).
        prior: Log-prior with H heads, nats; ``None`` is the uniform prior of plain attention.
        query_positions: (Q,) or (B, Q), tokens, or a ``range``; by default 0, 1, 2, ... On grids with a trailing axis.
        key_positions: (K,) or (B, K), likewise.
        attn_mask: Broadcastable to (B, H, Q, K): boolean with true where a query may attend, or floating and added to
            the score (nats).
        key_padding_mask: (B, K) boolean, true where a key is padding, as in ``nn.MultiheadAttention``.
        is_causal: Keys at later *positions* than the query are inadmissible.
        scale: Factor on the inner products, default 1 / sqrt(D).
        dropout_p: Probability of dropping a weight, in [0, 1).
        return_weights: Also return the weights (backend ``"reference"``).
        backend: ``"auto"``, ``"sdpa"`` (lanes through one fused call), ``"flex"`` (GPU) or ``"reference"`` (dense). A
            backend asked for by name is used or refused, never replaced. ``"auto"`` takes ``"reference"`` where weights
            are returned, else ``"sdpa"`` where the prior has lanes, else ``"flex"`` where it can serve the call, else
            ``"reference"``.

    Returns:
        (B, H, Q, V) in the dtype of ``query``; with ``return_weights`` also (B, H, Q, K), rows sum to one.

    Raises:
        ValueError: For shapes, devices, positions or values that do not fit.
        TypeError: For dtypes that do not fit.
        NotImplementedError: If the named backend cannot serve the call; names both backend and prior.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), proposition 3.1; Litman 2025 (arXiv 2508.08369).

    Example:
        >>> from eotattn.priors import RecencyPrior
        >>> query = key = value = torch.ones(1, 2, 5, 8)
        >>> prior_attention(query, key, value, prior=RecencyPrior(2), is_causal=True).shape
        torch.Size([1, 2, 5, 8])
    """
    _check_content(query, key, value)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else check_positive(OWNER, "scale", scale)
    require(0 <= dropout_p < 1, OWNER, "dropout_p", "lie in [0, 1)", dropout_p, "Pass a probability")
    check_choice(OWNER, "backend", backend, BACKENDS)
    call = _Call(query, key, value, prior, *_positions(query, key, prior, query_positions, key_positions), scale)
    check_same_device(OWNER, ("query", query), attn_mask=attn_mask, key_padding_mask=key_padding_mask)
    full_shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    seen = causal_mask(call.query_positions, call.key_positions) if is_causal else False
    mask, triangle = combine_masks(OWNER, full_shape, attn_mask, key_padding_mask, seen)
    chosen = _choose(call, mask, dropout_p, return_weights) if backend == "auto" else backend
    if reason := _refusal(chosen, call, mask, dropout_p, return_weights):
        named = "no prior" if prior is None else type(prior).__name__
        raise NotImplementedError(f"{OWNER}: backend {chosen!r} cannot serve this call with {named}: {reason}.")
    if chosen == "sdpa":
        return _through_lanes(call, mask, triangle, dropout_p)
    if chosen == "flex":
        return _through_flex(call, mask, triangle)
    output, weights = _through_dense(call, mask, triangle, dropout_p)
    return (output, weights) if return_weights else output


@dataclass(frozen=True)
class _Call:
    """What every backend needs of one call, checked."""

    query: Tensor
    key: Tensor
    value: Tensor
    prior: LogPrior | None
    query_positions: Positions
    key_positions: Positions
    scale: float


def _check_content(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(OWNER, name, tensor)
        require(tensor.dim() == 4, OWNER, name, "have shape (B, heads, length, width)", tensor, "Split the heads first")
        require(tensor.numel() > 0, OWNER, name, "not be empty", tensor, "Pass at least one token")
        require(tensor.dtype == query.dtype, OWNER, name, f"have the query's dtype {query.dtype}", tensor, "Cast it")
    check_same_device(OWNER, ("query", query), key=key, value=value)
    batch, heads, _, width = query.shape
    check_shape(OWNER, "key", key, (batch, None, None, width), "Match the query's batch and width")
    check_shape(OWNER, "value", value, (batch, key.shape[1], key.shape[2], None), "Match the key's heads and length")
    rule = f"have a number of heads that divides the query's {heads}"
    require(heads % key.shape[1] == 0, OWNER, "key", rule, key, "Choose num_kv_heads so")


def _positions(
    query: Tensor,
    key: Tensor,
    prior: LogPrior | None,
    query_positions: Tensor | range | None,
    key_positions: Tensor | range | None,
) -> tuple[Positions, Positions]:
    if prior is not None:
        require(
            isinstance(prior, LogPrior), OWNER, "prior", "be a LogPrior", prior, "See eotattn.priors", error=TypeError
        )
        heads = f"have the query's {query.shape[1]} heads"
        require(prior.num_heads == query.shape[1], OWNER, "prior", heads, prior.num_heads, "Build it for query heads")
    coordinates = 1 if prior is None else prior.num_coordinates
    sides = (("query_positions", query_positions, query), ("key_positions", key_positions, key))
    resolved = [
        resolve_positions(
            OWNER,
            name,
            given,
            batch=tensor.shape[0],
            length=tensor.shape[2],
            num_coordinates=coordinates,
            device=tensor.device,
        )
        for name, given, tensor in sides
    ]
    return resolved[0], resolved[1]


def _choose(call: _Call, mask: Tensor | None, dropout_p: float, return_weights: bool) -> str:
    for name in ("sdpa", "flex"):
        if _refusal(name, call, mask, dropout_p, return_weights) is None:
            return name
    return "reference"


def _refusal(name: str, call: _Call, mask: Tensor | None, dropout_p: float, return_weights: bool) -> str | None:
    """Why backend ``name`` cannot serve the call, or ``None``."""
    if name == "reference":
        return None
    if return_weights:
        return "fused kernels do not return weights; use backend='reference'"
    if name == "flex":
        return flex.refusal(call.query, mask=mask, dropout_p=dropout_p)
    if call.prior is not None and not call.prior.has_lanes:
        return "this prior has no lanes; use backend='reference' or 'flex'"
    return None


def _through_dense(call: _Call, mask: Tensor | None, triangle: bool, dropout_p: float) -> tuple[Tensor, Tensor]:
    log_prior = None
    if call.prior is not None:
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        log_prior = call.prior.dense(call.query_positions.tensor, call.key_positions.tensor, dtype=dtype)
    if triangle:
        mask = triangle_mask(call.query.shape[2], call.key.shape[2], call.query.device)
    elif mask is not None and mask.dtype != torch.bool:
        log_prior, mask = mask if log_prior is None else log_prior + mask, None
    return reference.attend(
        call.query, call.key, call.value, scale=call.scale, log_prior=log_prior, mask=mask, dropout_p=dropout_p
    )


def _through_lanes(call: _Call, mask: Tensor | None, triangle: bool, dropout_p: float) -> Tensor:
    query_lanes = key_lanes = None
    if call.prior is not None:
        lanes = call.prior.lanes(
            call.query_positions.tensor,
            call.key_positions.tensor,
            dtype=call.query.dtype,
            query_scale=1 / call.scale,
        ).grouped(call.key.shape[1])
        query_lanes, key_lanes = lanes.query, lanes.key
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(call.query.dtype)
    return sdpa.attend(
        call.query,
        call.key,
        call.value,
        scale=call.scale,
        query_lanes=query_lanes,
        key_lanes=key_lanes,
        mask=mask,
        is_causal=triangle,
        dropout_p=dropout_p,
    )


def _through_flex(call: _Call, mask: Tensor | None, triangle: bool) -> Tensor:
    score_mod = None
    if call.prior is not None:
        score_mod = call.prior.score_mod(call.query_positions.tensor, call.key_positions.tensor)
    return flex.attend(
        call.query, call.key, call.value, scale=call.scale, score_mod=score_mod, mask=mask, is_causal=triangle
    )
