"""One attention call, checked: what every backend, the cache, statistics and observers start from.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, V value width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eotattn.attention.attention_sinks import AttentionSinks, SinkKeys
from eotattn.attention.cache import KeyValueCache
from eotattn.attention.call_positions import (
    Band,
    GivenPositions,
    Positions,
    Shard,
    causal_pattern,
    resolve_positions,
    static_size,
)
from eotattn.attention.documents import PackedDocuments
from eotattn.attention.masks import Masks, gather_masks
from eotattn.attention.token_bias import check_biases, check_gains
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
from eotattn.compat import context_parallel_region
from eotattn.priors import LogPrior
from eotattn.priors.base import check_prior
from eotattn.priors.query_gain import gained
from eotattn.priors.reading import expand_heads

__all__ = ["AttentionCall", "autocast_dtype", "static_size"]

OWNER = "prior_attention"

#: What most calls have: every query sees all keys, or those up to its own place.
SQUARE, TRIANGLE = Masks(), Masks(band=Band())


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
        masks: Inadmissible keys, and what is added to scores.
        scale: Factor on the inner products.
        dropout_p: Probability of dropping a weight.
        return_weights: Whether the weights are asked for.
        return_lse: Whether the log-sum-exp of the rows is asked for.
        sinks: What queries attend to besides keys; joined to what a backend makes of the keys.
        tolerance: Error that lanes may add, nats; ``None`` for the dtype's own.
        cache: Where ``key`` and ``value`` are stored, with lanes beside the keys.
        key_bias: (B, 1 or Hk or H, K), nats, added to every score of a key.
        query_bias: (B, H, Q), nats, a constant of each row.
        query_gains: Factors (B, H, Q) of a query's own, one for each term of the prior or ``None``; or none at all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    prior: LogPrior | None
    query_positions: Positions
    key_positions: Positions
    masks: Masks
    scale: float
    dropout_p: float = 0.0
    return_weights: bool = False
    tolerance: float | None = None
    cache: KeyValueCache | None = None
    return_lse: bool = False
    sinks: SinkKeys | None = None
    key_bias: Tensor | None = None
    query_bias: Tensor | None = None
    query_gains: tuple[Tensor | None, ...] = ()

    @classmethod
    def from_arguments(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        prior: LogPrior | None = None,
        query_positions: GivenPositions = None,
        key_positions: GivenPositions = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        window: int | None = None,
        documents: PackedDocuments | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        return_weights: bool = False,
        tolerance: float | None = None,
        cache: KeyValueCache | None = None,
        return_lse: bool = False,
        sinks: AttentionSinks | Tensor | None = None,
        key_bias: Tensor | None = None,
        query_bias: Tensor | None = None,
        query_gains: Tensor | Sequence[Tensor | None] = (),
    ) -> AttentionCall:
        """Check the arguments of :func:`prior_attention`; raises what that function documents."""
        dtype = autocast_dtype(query.device) if isinstance(query, Tensor) else None
        if dtype is not None:
            query, key, value = _as_autocast(dtype, query, key, value)
        if not _fits(query, key, value):
            _refuse_content(query, key, value)
        (batch, heads, queries, width), keys, device = query.shape, key.shape[2], query.device
        if prior is not None and (not isinstance(prior, LogPrior) or prior.num_heads != heads):
            check_prior(OWNER, "prior", prior)
            rule = f"have the query's {heads} heads"
            require(False, OWNER, "prior", rule, prior.num_heads, "Build it for query heads")
        if prior is not None and prior.num_samples not in (None, batch):
            require(False, OWNER, "prior", f"be for {batch} samples", prior.num_samples, "Give one matrix a sample")
        if prior is not None and prior.biases_keys and key_bias is None:
            rule = f"be given with {type(prior).__name__}, which reads the tokens"
            fail(OWNER, "key_bias", rule, None, "Pass key_bias and query_bias of prior.read_tokens(...), as layers do")
        scale = 1 / math.sqrt(static_size(width)) if scale is None else check_positive(OWNER, "scale", scale)
        if cache is None and (key_bias is not None or query_bias is not None):  # a cache has checked what it holds
            check_biases(OWNER, query, key, key_bias, query_bias, scale)
        are_none = isinstance(query_gains, tuple) and len(query_gains) == 0  # ``not`` of a tuple stops graphs
        gains = () if are_none else check_gains(OWNER, query, prior, query_gains)
        if type(return_lse) is not bool or type(return_weights) is not bool:
            _refuse_switches(return_lse=return_lse, return_weights=return_weights)
        if dropout_p != 0.0:
            check_probability(OWNER, "dropout_p", dropout_p)
        if tolerance is not None:
            check_positive(OWNER, "tolerance", tolerance)
        of_sinks = None if sinks is None else SinkKeys.of(OWNER, sinks)
        if of_sinks is not None:
            of_sinks.check(OWNER, query, value)
        shared = None if context_parallel_region() is None else Shard.here(0, keys)
        if shared is not None:
            apart = {
                "attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "window": window, "documents": documents,
                "cache": cache, "sinks": sinks,
            }  # fmt: skip
            apart |= {"return_lse": return_lse or None, "return_weights": return_weights or None}
            _check_shared(query, key, prior, is_causal, shared, apart)
        if documents is not None:
            given = (query_positions, key_positions)
            return cls._of_documents(
                query, key, value, documents, given, prior=prior, attn_mask=attn_mask, padding=key_padding_mask,
                is_causal=is_causal, window=window, scale=scale, dropout_p=dropout_p, return_weights=return_weights,
                tolerance=tolerance, return_lse=return_lse, sinks=of_sinks, key_bias=key_bias, query_bias=query_bias,
                query_gains=gains,
            )  # fmt: skip
        num_coordinates = 1 if prior is None else prior.num_coordinates
        masked = window is not None or attn_mask is not None or key_padding_mask is not None or cache is not None
        placed = query_positions is not None or key_positions is not None
        plain = not masked and not placed and num_coordinates == 1 and shared is None
        if plain and (is_causal or not torch.compiler.is_compiling()) and queries == keys:  # as most calls are
            at = Positions(None, 0, queries, device)
            return cls(
                query, key, value, prior, at, at, TRIANGLE if is_causal else SQUARE, scale, dropout_p, return_weights,
                tolerance, None, return_lse, of_sinks, key_bias, query_bias, gains,
            )  # fmt: skip
        sizes: dict[str, Any] = {"batch": batch, "device": device, "num_coordinates": num_coordinates}
        query_at = resolve_positions(OWNER, "query_positions", query_positions, length=queries, **sizes)
        key_at = resolve_positions(OWNER, "key_positions", key_positions, length=keys, **sizes)
        if prior is not None and (query_at.given is not None or key_at.given is not None):
            prior.check_positions(query_at.tensor, key_at.tensor)
        seen: Band | Tensor | None = None
        if window is not None or is_causal:
            _check_pattern(is_causal, window, on_grid=query_at.on_grid)
            # slots are in the order of positions, padding or not
            in_slots = cache is not None and cache.counts_on_host and window is None
            seen = Band(keys - queries) if in_slots else causal_pattern(query_at, key_at, window)
        masks = _gather((batch, heads, queries, keys), query, attn_mask, key_padding_mask, seen, None)
        return cls(
            query, key, value, prior, query_at, key_at, masks, scale, dropout_p, return_weights, tolerance, cache,
            return_lse, of_sinks, key_bias, query_bias, gains,
        )  # fmt: skip

    @classmethod
    def _of_documents(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: PackedDocuments,
        given: tuple[GivenPositions, GivenPositions],
        *,
        prior: LogPrior | None,
        attn_mask: Tensor | None,
        padding: Tensor | None,
        is_causal: bool,
        window: int | None,
        **rest: Any,
    ) -> AttentionCall:
        """The call on packed documents, which decide positions and who sees whom."""
        is_packing, remedy = isinstance(documents, PackedDocuments), "Pass their lengths to PackedDocuments"
        require(is_packing, OWNER, "documents", "be PackedDocuments", documents, remedy, error=TypeError)
        batch, heads, length, _ = query.shape
        documents.check(OWNER, batch, length)
        check_shape(OWNER, "key", key, (None, None, length, None), "Documents attend to themselves")
        for name, positions in zip(("query_positions", "key_positions"), given, strict=True):
            rule = "be left out with documents, whose positions start at 0"
            require(positions is None, OWNER, name, rule, positions, "Drop it")
        rule, remedy = "be left out with documents", "Make the padding at the end of a row a document of its own"
        require(padding is None, OWNER, "key_padding_mask", rule, padding, remedy)
        rule = "lie on a sequence with documents"
        on_line = prior is None or prior.num_coordinates == 1
        require(on_line, OWNER, "prior", rule, type(prior).__name__, "Drop documents")
        if window is not None or is_causal:
            _check_pattern(is_causal, window, on_grid=False)
        at = Positions(
            documents.positions(batch, length, query.device),
            None,
            length,
            query.device,
            largest=documents.bound(length),
        )
        seen = Band(0, window) if is_causal else None
        masks = _gather((batch, heads, length, length), query, attn_mask, None, seen, documents)
        return cls(query, key, value, prior, at, at, masks, **rest)

    def with_content(self, key: Tensor, value: Tensor) -> AttentionCall:
        """The same call with other keys and values of the same shapes, in the dtype of the call."""
        return replace(self, key=key.to(self.key.dtype), value=value.to(self.value.dtype))

    @property
    def needs_lse(self) -> bool:
        """Whether a backend has to return the log-sum-exp of the keys."""
        return self.return_lse or self.sinks is not None

    @property
    def is_shared(self) -> bool:
        """Whether other processes hold more keys, and PyTorch's ``context_parallel`` serves stock calls alone."""
        return self.query_positions.shard is not None

    @property
    def follows_gradients(self) -> bool:
        """Whether gradients of the content, or of what lanes beside it carry, will be asked for."""
        if not torch.is_grad_enabled():
            return False
        sides = (self.query, self.key, self.value, self.key_bias, self.query_bias, *self.query_gains)
        learned = () if self.prior is None else self.prior.parameters()
        return any(one is not None and one.requires_grad for one in (*sides, *learned))

    @property
    def has_log_prior(self) -> bool:
        """Whether anything is added to the scores besides masks."""
        return self.prior is not None or self.key_bias is not None

    @property
    def prior_name(self) -> str:
        """Class of the prior, for messages."""
        return "no prior" if self.prior is None else type(self.prior).__name__

    def dense_mask(self) -> Tensor | None:
        """All masks as one, boolean or floating."""
        return self.masks.as_dense(self.query.shape[0], self.query.shape[2], self.key.shape[2], self.query.device)

    def log_prior(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor | None:
        """The log-prior of queries ``start`` to ``stop`` and all keys, ([B,] H, stop - start, K), in ``dtype``."""
        count = (self.query.shape[2] if stop is None else stop) - start
        total: Tensor | None = None
        if self.prior is not None:
            axis = -1 if self.prior.num_coordinates == 1 else -2
            positions = self.query_positions.tensor.narrow(axis, start, count)
            total = self.prior.dense(positions, self.key_positions.tensor, dtype=dtype)
            if self.query_gains:
                gains = [None if gain is None else gain[:, :, start : start + count] for gain in self.query_gains]
                total = total + gained(self.prior.terms(), gains, positions, self.key_positions.tensor).to(dtype)
        sides = [] if self.key_bias is None else [expand_heads(self.key_bias, self.query.shape[1]).unsqueeze(-2)]
        if self.query_bias is not None:
            sides.append(self.query_bias[:, :, start : start + count, None])
        if not sides:
            return total
        wide = [side.to(torch.promote_types(side.dtype, dtype)) for side in sides]
        bias = sum(wide[1:], start=wide[0]).to(dtype)  # large numbers that cancel, before they are rounded
        return bias if total is None else total + bias


def _check_shared(
    query: Tensor, key: Tensor, prior: LogPrior | None, is_causal: bool, shard: Shard, apart: dict[str, Any]
) -> None:
    """Raise unless PyTorch's ``context_parallel`` can serve the call: one stock call on the tokens of all processes."""
    for name, given in apart.items():
        rule, remedy = (
            "be left out in context_parallel",
            "Attend outside of it, to one shard of keys at a time, and merge",
        )
        require(given is None, OWNER, name, rule, given, remedy)
    has_lanes, remedy = prior is None or prior.has_lanes, "Use one with lanes"
    require(has_lanes, OWNER, "prior", "have lanes in context_parallel", type(prior).__name__, remedy)
    if query.shape[2] != key.shape[2]:
        rule = f"have the query's {query.shape[2]} tokens in context_parallel"
        fail(OWNER, "key", rule, key, "Let every process hold queries and keys of the same tokens")
    rule, remedy = "be true in context_parallel, whose shards are balanced for it", "Turn its load balancing off"
    require(is_causal or not shard.is_balanced, OWNER, "is_causal", rule, is_causal, remedy)


def _refuse_switches(**switches: object) -> None:
    for name, value in switches.items():
        require(type(value) is bool, OWNER, name, "be True or False", value, "Pass a bool", error=TypeError)


def _check_pattern(is_causal: bool, window: int | None, *, on_grid: bool) -> None:
    if is_causal and on_grid:
        fail(OWNER, "is_causal", "be false on grids", is_causal, "Pass attn_mask for an order of cells")
    if window is not None:
        check_positive_int(OWNER, "window", window)
        require(is_causal, OWNER, "window", "be left out without is_causal", window, "Pass is_causal=True")


def _gather(
    shape: tuple[int, int, int, int],
    query: Tensor,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    seen: Band | Tensor | None,
    documents: PackedDocuments | None,
) -> Masks:
    if attn_mask is None and padding is None and not isinstance(seen, Tensor):
        return Masks(band=seen, documents=documents)
    masks = gather_masks(OWNER, shape, attn_mask, padding, seen, documents)
    check_same_device(OWNER, ("query", query), attn_mask=attn_mask, key_padding_mask=padding)
    return masks


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast runs fused calls on ``device``, or ``None`` outside autocast."""
    # not torch.amp.is_autocast_available, which the compiler of PyTorch 2.11 cannot trace
    active = device.type in ("cpu", "cuda", "xpu", "mps") and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if active else None


def _as_autocast(dtype: torch.dtype, *content: Tensor) -> tuple[Tensor, ...]:
    """What autocast would make of a fused call's arguments, done before lanes are written in their dtype."""
    if not all(isinstance(tensor, Tensor) for tensor in content):
        return content
    narrow = (torch.float32, torch.bfloat16, torch.float16)  # as autocast itself: float64 stays
    return tuple(tensor.to(dtype) if tensor.dtype in narrow else tensor for tensor in content)


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
