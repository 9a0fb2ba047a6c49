"""PriorAttention: projections around :func:`prior_attention`, called like ``nn.MultiheadAttention``.

Legend: B batch, E model width, H query heads, Hk key heads, Q queries, K keys, D content width, V value width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from eotattn.attention.backends import BACKENDS
from eotattn.attention.cache import KeyValueCache
from eotattn.attention.documents import PackedDocuments
from eotattn.attention.functional import prior_attention
from eotattn.attention.layer.appended_keys import AppendedKeys
from eotattn.attention.layer.conversion import as_batch, copy_weights, multihead_arguments
from eotattn.attention.layer.projected_heads import Heads, ProjectedHeads
from eotattn.attention.layer.rotary import Rotary
from eotattn.attention.masks import from_multihead_convention
from eotattn.checks import check_choice, check_floating, check_positive_int, check_probability, fail, require
from eotattn.kernels.sdpa import WIDTH_STEP
from eotattn.priors import LogPrior
from eotattn.priors.base import check_prior

__all__ = ["Heads", "PriorAttention"]


class PriorAttention(ProjectedHeads):
    """Multi-head attention with a log-prior: MHA, GQA or MQA, self- or cross-attention.

    It is called like ``nn.MultiheadAttention`` and returns the same pair, so ``nn.TransformerEncoderLayer`` can hold it
    as ``self_attn``. Differences: ``key`` and ``value`` default to ``query``, ``batch_first`` defaults to true,
    ``is_causal`` needs no mask beside it, and a query without admissible keys gets zeros instead of NaN.

    Args:
        embed_dim: Model width E.
        num_heads: Query heads H; E must be a multiple.
        num_kv_heads: Key and value heads Hk, a divisor of H; by default H.
        kdim: Width of ``key`` inputs; by default E.
        vdim: Width of ``value`` inputs; by default E.
        prior: Log-prior with H heads; ``None`` for plain attention.
        rotary: :class:`Rotary` for queries and keys; composes with any prior.
        lanes: ``"appended"`` leaves the content the whole head width E / H and widens the fused call; ``"reserved"``
            takes the prior's lanes out of the head width, so that the call stays as wide as the head. (Key lanes that
            differ between query heads, as those of u(j), are not reserved a second time for query heads that share a
            key head: there, and with padding, the call is a few lanes wider.) No projection row is dead either way:
            projections are as wide as the content.
        lane_dtype: Dtype that the layer will attend in, which decides how many lanes are reserved: 16-bit dtypes take
            several for each float32 one, to be as exact, and a multiple of 8 in all. A layer that runs in another dtype
            stays right, but spills over the head width (fewer lanes reserved than it needs) or leaves some unused.
        window: Keys that a query sees at most, itself included; calls are then causal ones.
        dropout: Probability of dropping a weight in training.
        bias: Whether the projections have biases.
        add_bias_kv: Whether there is a learned key and value beside those of tokens (:class:`AppendedKeys`).
        add_zero_attn: Whether there is a key and value of zeros beside them.
        batch_first: Whether inputs are (B, length, E) rather than (length, B, E).
        backend: As in :func:`prior_attention`.
        device: Device of the parameters.
        dtype: Dtype of the projections; the prior keeps its own.

    Example:
        >>> from eotattn.priors import RecencyPrior
        >>> layer = PriorAttention(16, num_heads=4, prior=RecencyPrior(4))
        >>> output, weights = layer(torch.ones(2, 5, 16), is_causal=True, need_weights=False)
        >>> output.shape
        torch.Size([2, 5, 16])
    """

    # nn.TransformerEncoderLayer reads these to decide that its own fused path does not apply.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        prior: LogPrior | None = None,
        rotary: Rotary | None = None,
        lanes: str = "appended",
        lane_dtype: torch.dtype = torch.float32,
        window: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        batch_first: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner, make = type(self).__name__, dict[str, Any](device=device, dtype=dtype)
        if prior is not None:
            check_prior(owner, "prior", prior)
            have = prior.num_heads
            require(have == num_heads, owner, "prior", f"have {num_heads} heads", have, "Build it for query heads")
        widths: dict[str, Any] = {"num_kv_heads": num_kv_heads, "kdim": kdim, "vdim": vdim}
        reserved = _num_reserved(owner, prior, lanes, lane_dtype)
        super().__init__(embed_dim, num_heads, **widths, reserved=reserved, rotary=rotary, bias=bias, **make)
        self.backend = check_choice(owner, "backend", backend, ("auto", *BACKENDS))
        self.window = None if window is None else check_positive_int(owner, "window", window)
        self.lanes, self.dropout, self.batch_first = lanes, check_probability(owner, "dropout", dropout), batch_first
        self.scale = 1 / math.sqrt(self.content_dim)
        self.prior = prior  # not reset: it may come trained
        on_line, rule = prior is None or prior.num_coordinates == 1, "lie on a sequence with appended keys"
        remedy = "Drop add_bias_kv and add_zero_attn, or add a ClassTokenPrior"
        require(on_line or not (add_bias_kv or add_zero_attn), owner, "prior", rule, type(prior).__name__, remedy)
        sizes, kinds = (self.num_kv_heads, self.content_dim, self.head_dim), (add_bias_kv, add_zero_attn)
        self.appended = AppendedKeys(*sizes, learned=kinds[0], zero=kinds[1], **make) if any(kinds) else None

    def reset_parameters(self) -> None:
        """Initialise the projections as ``nn.MultiheadAttention`` does (Xavier, zero biases); reset the prior."""
        self.reset_projections()
        if self.appended is not None:
            self.appended.reset_parameters()
        if self.prior is not None:
            self.prior.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_positions: Tensor | range | None = None,
        key_positions: Tensor | range | None = None,
        documents: PackedDocuments | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; the arguments up to ``is_causal`` are those of ``nn.MultiheadAttention``, in its order.

        Args:
            query: (B, Q, E) if ``batch_first``, else (Q, B, E); or (Q, E).
            key: Likewise with K and ``kdim``; by default ``query``.
            value: Likewise with K and ``vdim``; by default ``key``.
            key_padding_mask: (B, K), true where a key is padding; floating ones are added to the score (not with a
                cache, which has to know what is padding).
            need_weights: Return the weights; this takes the dense path. Pass false for speed.
            attn_mask: (Q, K), (B * H, Q, K) or (B, H, Q, K); boolean with true where a query may *not* attend, or
                floating and added to the score, nats.
            average_attn_weights: Return weights averaged over the heads.
            is_causal: Keys at later positions than the query are inadmissible.
            query_positions: (Q,) or (B, Q), tokens, or a ``range``; by default 0, 1, 2, ...
            key_positions: (K,) or (B, K), likewise; by default those of the query where ``key`` is left out or is the
                same object, else 0, 1, 2, ...
            documents: Documents packed into the batch; each attends to itself alone, at positions from 0 on.
            cache: Earlier keys and values of this layer; the new ones are appended to it, positions follow from it, and
                ``key_padding_mask`` speaks of the new tokens. For inference: no gradient reaches cached tensors.

        Returns:
            Output shaped like ``query``, and the weights (B, Q, K) or (B, H, Q, K), or ``None``. Appended keys come
            last in the weights.
        """
        owner = type(self).__name__
        key = query if key is None else key
        value = key if value is None else value
        for name, side in (("query", query), ("key", key), ("value", value)):
            check_floating(owner, name, side)
        is_batched = query.dim() == 3
        require(query.dim() in (2, 3), owner, "query", "have two or three axes", query, "Add or drop the batch axis")
        if key is query and key_positions is None:
            key_positions = query_positions
        inputs = as_batch(query, key, value, is_batched=is_batched, batch_first=self.batch_first)
        self.check_widths(*inputs)
        if cache is not None and isinstance(key_padding_mask, Tensor) and key_padding_mask.is_floating_point():
            rule, remedy = "be boolean with a cache, which keeps it for later calls", "Compare it with zero"
            fail(owner, "key_padding_mask", rule, key_padding_mask, remedy, error=TypeError)
        mask, padding = from_multihead_convention(
            owner, attn_mask, key_padding_mask, batch=inputs[0].shape[0], num_heads=self.num_heads
        )
        at = self._positions(inputs[0], query_positions, key_positions, padding, documents, cache)
        content = self.project(*inputs, query_positions=at[0], key_positions=at[1])
        if documents is not None or cache is not None:
            at = (None, None)  # they say it themselves
        if self.appended is not None:
            require(documents is None, owner, "documents", "be left out with appended keys", documents, "Drop one")
            length = content.key.shape[2] + (0 if cache is None else cache.length - self.appended.count)
            mask = self.appended.widen(mask, length, visible=True)
        if self.appended is not None and cache is None:  # a cache has them since it was made
            padding = self.appended.widen(padding, length, visible=False)
            at = (at[0], self.appended.positions(at[1], length, query.device))
            content = Heads(content.query, *self.appended(content.key, content.value))
        result = prior_attention(
            *content,
            prior=self.prior,
            query_positions=at[0],
            key_positions=at[1],
            attn_mask=mask,
            key_padding_mask=padding,
            is_causal=is_causal,
            window=self.window,
            documents=documents,
            cache=cache,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=need_weights,
            backend=self.backend,
        )
        heads, weights = result if isinstance(result, tuple) else (result, None)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights if self.appended is None else self.appended.last(weights)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        if not is_batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _positions(
        self,
        query: Tensor,
        query_positions: Tensor | range | None,
        key_positions: Tensor | range | None,
        padding: Tensor | None,
        documents: PackedDocuments | None,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor | range | None, Tensor | range | None]:
        """Positions of the tokens of both sides."""
        if documents is None and cache is None:
            return query_positions, key_positions
        owner, place = type(self).__name__, "documents" if cache is None else "the cache"
        for name, given in (("query_positions", query_positions), ("key_positions", key_positions)):
            require(given is None, owner, name, f"be left to {place}", given, "Drop the positions")
        batch, length, _ = query.shape
        if cache is not None:
            positions: Tensor | range = cache.next_positions(length, padding)
        elif documents is not None:
            documents.check(owner, batch, length)
            positions = documents.positions(batch, length, query.device)
        return positions, positions

    def make_cache(self, batch_size: int, max_length: int) -> KeyValueCache:
        """An empty :class:`KeyValueCache` for this layer and its prior, ``max_length`` tokens long.

        Appended keys take its first slots.
        """
        weight, appended = self.out_proj.weight, self.appended
        count = 0 if appended is None else appended.count
        sizes = (batch_size, self.num_kv_heads, max_length + count, self.content_dim, self.head_dim)
        cache = KeyValueCache(*sizes, prior=self.prior, first_position=-count, dtype=weight.dtype, device=weight.device)
        if appended is not None:
            nothing = [weight.new_zeros(*sizes[:2], 0, width) for width in sizes[3:]]
            cache.append(*appended(*nothing))
        return cache

    @classmethod
    def from_multihead_attention(
        cls, attention: nn.MultiheadAttention, *, prior: LogPrior | None = None, backend: str = "auto"
    ) -> PriorAttention:
        """A layer with the weights of ``attention``; equal to it while the prior is neutral.

        Args:
            attention: The layer to convert; not changed.
            prior: Log-prior with as many heads, its lanes appended, so that no content is lost.
            backend: As in :func:`prior_attention`.
        """
        is_known, remedy = isinstance(attention, nn.MultiheadAttention), "Build other layers by hand"
        rule = "be an nn.MultiheadAttention"
        require(is_known, cls.__name__, "attention", rule, type(attention).__name__, remedy, error=TypeError)
        layer = PriorAttention(**multihead_arguments(attention), prior=prior, backend=backend)
        copy_weights(attention, layer)
        return layer.train(attention.training)

    def extra_repr(self) -> str:
        """The numbers that define the layer."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"


def _num_reserved(owner: str, prior: LogPrior | None, lanes: str, lane_dtype: torch.dtype) -> int:
    """Columns of a head that the prior takes."""
    check_choice(owner, "lanes", lanes, ("appended", "reserved"))
    if lanes == "appended" or prior is None:
        idle = lane_dtype == torch.float32
        require(idle, owner, "lane_dtype", "be left alone where no lanes are reserved", lane_dtype, "Drop it")
        return 0
    require(prior.has_lanes, owner, "prior", "have lanes to reserve", type(prior).__name__, "Use lanes='appended'")
    known = isinstance(lane_dtype, torch.dtype) and lane_dtype.is_floating_point
    require(known, owner, "lane_dtype", "be a floating dtype", lane_dtype, "Pass e.g. torch.bfloat16", error=TypeError)
    num_lanes = prior.num_lanes(lane_dtype)
    step = WIDTH_STEP if lane_dtype.itemsize < 4 else 1  # so that every row of the content is read in whole words
    return -(-num_lanes // step) * step
