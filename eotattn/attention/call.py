"""One attention call, checked: what every backend starts from.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, V value width.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eotattn.attention.cache import KeyValueCache
from eotattn.attention.documents import PackedDocuments
from eotattn.attention.masks import Masks, gather_masks
from eotattn.attention.positions import Band, Positions, causal_pattern, resolve_positions
from eotattn.checks import (
    check_floating,
    check_positive,
    check_positive_int,
    check_probability,
    check_same_device,
    check_shape,
    fail,
    require,
)
from eotattn.priors import LogPrior
from eotattn.priors.base import check_prior

__all__ = ["AttentionCall", "without_autocast"]

OWNER = "prior_attention"


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of :func:`prior_attention` after every check, with defaults filled in.

    Args:
        query: (B, H, Q, D).
        key: (B, Hk, K, D).
        value: (B, Hk, K, V).
        prior: Log-prior with H heads, or ``None``.
        query_positions: Resolved positions of the queries.
        key_positions: Resolved positions of the keys.
        masks: Inadmissible keys.
        scale: Factor on the inner products.
        dropout_p: Probability of dropping a weight.
        return_weights: Whether the weights are asked for.
        cache: Where ``key`` and ``value`` are stored, with lanes beside the keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    prior: LogPrior | None
    query_positions: Positions
    key_positions: Positions
    masks: Masks
    scale: float
    dropout_p: float
    return_weights: bool
    cache: KeyValueCache | None = None

    @classmethod
    def check(
        cls,
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
        window: int | None = None,
        documents: PackedDocuments | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        return_weights: bool = False,
        cache: KeyValueCache | None = None,
    ) -> AttentionCall:
        """Check the arguments of :func:`prior_attention`; raises what that function documents."""
        query, key, value = _as_autocast(query, key, value)
        _check_content(query, key, value)
        _check_prior(prior, query.shape[1])
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else check_positive(OWNER, "scale", scale)
        check_probability(OWNER, "dropout_p", dropout_p)
        if documents is not None:
            _check_documents(documents, query, key, query_positions, key_positions, key_padding_mask)
            query_positions = key_positions = documents.positions(query.shape[0], query.shape[2], query.device)
        queries = _resolve("query_positions", query_positions, query, prior)
        keys = _resolve("key_positions", key_positions, key, prior)
        if is_causal and queries.on_grid:
            fail(OWNER, "is_causal", "be false on grids", is_causal, "Pass attn_mask for an order of cells")
        if window is not None:
            check_positive_int(OWNER, "window", window)
            require(is_causal, OWNER, "window", "be left out without is_causal", window, "Pass is_causal=True")
        seen: Band | Tensor | None = None
        if is_causal and documents is not None:
            seen = Band(0, window)
        elif is_causal and cache is not None and window is None:
            seen = Band(keys.length - queries.length)  # slots are in the order of positions, whatever is padding
        elif is_causal:
            seen = causal_pattern(queries, keys, window)
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        masks = gather_masks(OWNER, shape, attn_mask, key_padding_mask, seen, documents)
        if attn_mask is not None or key_padding_mask is not None:
            check_same_device(OWNER, ("query", query), attn_mask=attn_mask, key_padding_mask=key_padding_mask)
        return cls(query, key, value, prior, queries, keys, masks, scale, dropout_p, return_weights, cache)

    def with_content(self, key: Tensor, value: Tensor) -> AttentionCall:
        """The same call with other keys and values of the same shapes, in the dtype of the call."""
        return replace(self, key=key.to(self.key.dtype), value=value.to(self.value.dtype))

    @property
    def prior_name(self) -> str:
        """Class of the prior, for messages."""
        return "no prior" if self.prior is None else type(self.prior).__name__

    def dense_mask(self) -> Tensor | None:
        """All masks as one, boolean or floating."""
        return self.masks.as_dense(self.query.shape[0], self.query.shape[2], self.key.shape[2], self.query.device)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast runs fused calls on ``device``, or ``None`` outside autocast."""
    # not torch.amp.is_autocast_available, which the compiler of PyTorch 2.11 cannot trace
    active = device.type in ("cpu", "cuda", "xpu", "mps") and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if active else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which tensors keep the dtype they have."""
    return nullcontext() if _autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def _as_autocast(*content: Tensor) -> tuple[Tensor, ...]:
    """What autocast would make of a fused call's arguments, done before lanes are written in their dtype."""
    if not all(isinstance(tensor, Tensor) for tensor in content):
        return content
    dtype = _autocast_dtype(content[0].device)
    narrow = (torch.float32, torch.bfloat16, torch.float16)  # as autocast itself: float64 stays
    return tuple(tensor if dtype is None or tensor.dtype not in narrow else tensor.to(dtype) for tensor in content)


def _check_content(query: Tensor, key: Tensor, value: Tensor) -> None:
    if not _fits(query, key, value):
        _refuse_content(query, key, value)


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`_refuse_content` has nothing to say; quick, since every call asks."""
    for tensor in (query, key, value):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4 or tensor.dtype != query.dtype:
            return False
    if not query.is_floating_point() or query.device != key.device or query.device != value.device:
        return False
    (batch, heads, queries, width), (_, key_heads, keys, value_width) = query.shape, value.shape
    if 0 in (heads, queries, width, key_heads, keys, value_width):
        return False
    return heads % key_heads == 0 and value.shape[0] == batch and tuple(key.shape) == (batch, key_heads, keys, width)


def _refuse_content(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(OWNER, name, tensor)
        require(tensor.dim() == 4, OWNER, name, "have shape (B, heads, length, width)", tensor, "Split the heads first")
        require(0 not in tensor.shape[1:], OWNER, name, "not be empty", tensor, "Pass at least one token")
        require(tensor.dtype == query.dtype, OWNER, name, f"have the query's dtype {query.dtype}", tensor, "Cast it")
    check_same_device(OWNER, ("query", query), key=key, value=value)
    batch, heads, _, width = query.shape
    check_shape(OWNER, "key", key, (batch, None, None, width), "Match the query's batch and width")
    check_shape(OWNER, "value", value, (batch, key.shape[1], key.shape[2], None), "Match the key's heads and length")
    rule = f"have a number of heads that divides the query's {heads}"
    require(heads % key.shape[1] == 0, OWNER, "key", rule, key, "Choose num_kv_heads so")


def _check_prior(prior: LogPrior | None, num_heads: int) -> None:
    if prior is None:
        return
    check_prior(OWNER, "prior", prior)
    rule = f"have the query's {num_heads} heads"
    require(prior.num_heads == num_heads, OWNER, "prior", rule, prior.num_heads, "Build it for query heads")


def _check_documents(
    documents: PackedDocuments,
    query: Tensor,
    key: Tensor,
    query_positions: Tensor | range | None,
    key_positions: Tensor | range | None,
    key_padding_mask: Tensor | None,
) -> None:
    is_packing, remedy = isinstance(documents, PackedDocuments), "Pass their lengths to PackedDocuments"
    require(is_packing, OWNER, "documents", "be PackedDocuments", documents, remedy, error=TypeError)
    documents.check(OWNER, query.shape[0], query.shape[2])
    check_shape(OWNER, "key", key, (None, None, query.shape[2], None), "Documents attend to themselves")
    given = (("query_positions", query_positions), ("key_positions", key_positions))
    for name, positions in given:
        rule = "be left out with documents, whose positions start at 0"
        require(positions is None, OWNER, name, rule, positions, "Drop it")
    rule, remedy = "be left out with documents", "Make the padding at the end of a row a document of its own"
    require(key_padding_mask is None, OWNER, "key_padding_mask", rule, key_padding_mask, remedy)


def _resolve(argument: str, given: Tensor | range | None, content: Tensor, prior: LogPrior | None) -> Positions:
    return resolve_positions(
        OWNER,
        argument,
        given,
        batch=content.shape[0],
        length=content.shape[2],
        num_coordinates=1 if prior is None else prior.num_coordinates,
        device=content.device,
    )
