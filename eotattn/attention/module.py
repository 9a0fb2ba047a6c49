"""PriorAttention: projections around :func:`prior_attention`, called like ``nn.MultiheadAttention``.

Legend: B batch, E model width, H query heads, Hk key heads, Q queries, K keys, D content width, V value width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eotattn.attention.appended_keys import AppendedKeys
from eotattn.attention.backends import BACKENDS
from eotattn.attention.cache import KeyValueCache
from eotattn.attention.conversion import as_batch, copy_weights, multihead_arguments
from eotattn.attention.documents import PackedDocuments
from eotattn.attention.functional import prior_attention
from eotattn.attention.masks import from_multihead_convention
from eotattn.attention.projections import PackedProjection, SeparateProjections
from eotattn.attention.rotary import Rotary
from eotattn.checks import check_choice, check_positive_int, require
from eotattn.priors import LogPrior
from eotattn.priors.base import check_prior

__all__ = ["Heads", "PriorAttention"]


class Heads(NamedTuple):
    """Projected content of one call: query (B, H, Q, D), key (B, Hk, K, D), value (B, Hk, K, V)."""

    query: Tensor
    key: Tensor
    value: Tensor


class PriorAttention(nn.Module):
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
            takes the prior's lanes out of the head width, so that the call stays as wide as the head. No projection row
            is dead either way: projections are as wide as the content.
        lane_dtype: Dtype that the layer will attend in, which decides how many lanes are reserved: 16-bit dtypes take
            several for each float32 one, to be as exact. A layer that runs in another dtype stays right, but spills
            over the head width (fewer lanes reserved than it needs) or leaves some of it unused.
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
        super().__init__()
        owner = type(self).__name__
        self.embed_dim = check_positive_int(owner, "embed_dim", embed_dim)
        self.num_heads = check_positive_int(owner, "num_heads", num_heads)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.num_kv_heads = check_positive_int(owner, "num_kv_heads", kv_heads)
        _check_heads(owner, embed_dim, num_heads, self.num_kv_heads, prior)
        require(0 <= dropout < 1, owner, "dropout", "lie in [0, 1)", dropout, "Pass a probability")
        self.backend = check_choice(owner, "backend", backend, ("auto", *BACKENDS))
        self.lanes = check_choice(owner, "lanes", lanes, ("appended", "reserved"))
        self.window = None if window is None else check_positive_int(owner, "window", window)
        self.head_dim = embed_dim // num_heads
        self.content_dim = self._content_dim(prior, lane_dtype)
        if rotary is not None:
            rule = f"have width {self.content_dim}"
            require(rotary.width == self.content_dim, owner, "rotary", rule, rotary.width, "Rebuild it for the content")
        self.scale = 1 / math.sqrt(self.content_dim)
        self.dropout, self.batch_first = dropout, batch_first
        self.kdim = embed_dim if kdim is None else check_positive_int(owner, "kdim", kdim)
        self.vdim = embed_dim if vdim is None else check_positive_int(owner, "vdim", vdim)
        self.prior, self.rotary = prior, rotary
        make: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        content_widths = (num_heads * self.content_dim, self.num_kv_heads * self.content_dim)
        widths = (*content_widths, self.num_kv_heads * self.head_dim)
        self.in_proj: PackedProjection | SeparateProjections
        if kdim is None and vdim is None:
            self.in_proj = PackedProjection(embed_dim, widths, **make)
        else:
            self.in_proj = SeparateProjections((embed_dim, self.kdim, self.vdim), widths, **make)
        self.out_proj = nn.Linear(embed_dim, embed_dim, **make)
        del make["bias"]
        kinds = {"learned": add_bias_kv, "zero": add_zero_attn}
        sizes = (self.num_kv_heads, self.content_dim, self.head_dim)
        self.appended = AppendedKeys(*sizes, **kinds, **make) if add_bias_kv or add_zero_attn else None
        self._reset_projections()  # not the prior: it may come trained

    def _content_dim(self, prior: LogPrior | None, lane_dtype: torch.dtype) -> int:
        owner = type(self).__name__
        if self.lanes == "appended" or prior is None:
            idle = lane_dtype == torch.float32
            require(idle, owner, "lane_dtype", "be left alone where no lanes are reserved", lane_dtype, "Drop it")
            return self.head_dim
        require(prior.has_lanes, owner, "prior", "have lanes to reserve", type(prior).__name__, "Use lanes='appended'")
        width = self.head_dim - prior.num_lanes(lane_dtype)
        rule = f"leave content in a head of width {self.head_dim}"
        got = f"{prior.num_lanes(lane_dtype)} lanes"
        require(width > 0, owner, "prior", rule, got, "Use fewer frequencies or lanes='appended'")
        return width

    def reset_parameters(self) -> None:
        """Initialise the projections as ``nn.MultiheadAttention`` does (Xavier, zero biases); reset the prior."""
        self._reset_projections()
        if self.appended is not None:
            self.appended.reset_parameters()
        if self.prior is not None:
            self.prior.reset_parameters()

    def _reset_projections(self) -> None:
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def project(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        query_positions: Tensor | range | None = None,
        key_positions: Tensor | range | None = None,
    ) -> Heads:
        """Project (B, length, E) inputs to heads, rotary applied: what :func:`prior_attention` receives."""
        flat = self.in_proj(query, key, value)
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        heads = [part.unflatten(-1, (count, -1)).transpose(1, 2) for part, count in zip(flat, counts, strict=True)]
        if self.rotary is not None:
            heads[0] = self.rotary(heads[0], query_positions, argument="query_positions")
            heads[1] = self.rotary(heads[1], key_positions, argument="key_positions")
        return Heads(*heads)

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
            key_padding_mask: (B, K), true where a key is padding; floating ones are added to the score.
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
        is_batched = query.dim() == 3
        require(query.dim() in (2, 3), owner, "query", "have two or three axes", query, "Add or drop the batch axis")
        if key is query and key_positions is None:
            key_positions = query_positions
        inputs = as_batch(query, key, value, is_batched=is_batched, batch_first=self.batch_first)
        self._check_widths(*inputs)
        mask, padding = from_multihead_convention(
            owner, attn_mask, key_padding_mask, batch=inputs[0].shape[0], num_heads=self.num_heads
        )
        at = self._positions(inputs[0], query_positions, key_positions, padding, documents, cache)
        content = self.project(*inputs, query_positions=at[0], key_positions=at[1])
        if documents is not None or cache is not None:
            at = (None, None)  # they say it themselves
        if self.appended is not None:
            require(documents is None, owner, "documents", "be left out with appended keys", documents, "Drop one")
            length = content.key.shape[2]
            known = length if cache is None else cache.length - self.appended.count + length
            mask = self.appended.widen(mask, known, visible=True)
            if cache is None:
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

    def _check_widths(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        sides = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, tensor, width in sides:
            fits = tensor.dim() == 3 and tensor.shape[-1] == width
            require(fits, type(self).__name__, name, f"have width {width} in its last axis", tensor, "Check the inputs")

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
        layer = PriorAttention(**multihead_arguments(attention), prior=prior, backend=backend)
        copy_weights(attention, layer)
        return layer.train(attention.training)

    def extra_repr(self) -> str:
        """The numbers that define the layer."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"


def _check_heads(owner: str, embed_dim: int, num_heads: int, num_kv_heads: int, prior: LogPrior | None) -> None:
    divides = embed_dim % num_heads == 0
    require(divides, owner, "embed_dim", f"be a multiple of num_heads ({num_heads})", embed_dim, "Change one")
    rule = f"divide num_heads ({num_heads})"
    require(num_heads % num_kv_heads == 0, owner, "num_kv_heads", rule, num_kv_heads, "Choose a divisor")
    if prior is not None:
        check_prior(owner, "prior", prior)
        have = prior.num_heads
        require(have == num_heads, owner, "prior", f"have {num_heads} heads", have, "Build it for query heads")
