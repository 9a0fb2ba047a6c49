"""PriorAttention: projections around :func:`prior_attention`, called like ``nn.MultiheadAttention``.

Legend: B batch, E model width, H query heads, Hk key heads, Q queries, K keys, D content width, V value width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eotattn.attention.backends import BACKENDS
from eotattn.attention.cache import KeyValueCache
from eotattn.attention.functional import prior_attention
from eotattn.attention.masks import from_multihead_convention
from eotattn.attention.positions import resolve_positions
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
        dropout: Probability of dropping a weight in training.
        bias: Whether the projections have biases.
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
        dropout: float = 0.0,
        bias: bool = True,
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
        divides = embed_dim % num_heads == 0
        require(divides, owner, "embed_dim", f"be a multiple of num_heads ({num_heads})", embed_dim, "Change one")
        rule = f"divide num_heads ({num_heads})"
        require(num_heads % self.num_kv_heads == 0, owner, "num_kv_heads", rule, num_kv_heads, "Choose a divisor")
        require(0 <= dropout < 1, owner, "dropout", "lie in [0, 1)", dropout, "Pass a probability")
        self.backend = check_choice(owner, "backend", backend, ("auto", *BACKENDS))
        self.lanes = check_choice(owner, "lanes", lanes, ("appended", "reserved"))
        if prior is not None:
            check_prior(owner, "prior", prior)
            have = prior.num_heads
            require(have == num_heads, owner, "prior", f"have {num_heads} heads", have, "Build it for query heads")
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
            sides = (("query_positions", query_positions), ("key_positions", key_positions))
            for side, (name, positions) in enumerate(sides):
                heads[side] = self._rotate(name, heads[side], positions)
        return Heads(*heads)

    def _rotate(self, name: str, content: Tensor, positions: Tensor | range | None) -> Tensor:
        batch, _, length, _ = content.shape
        resolved = resolve_positions(
            type(self).__name__,
            name,
            positions,
            batch=batch,
            length=length,
            num_coordinates=1,
            device=content.device,
        )
        return self.rotary(content, resolved.tensor) if self.rotary is not None else content

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
            cache: Earlier keys and values of this layer; the new ones are appended to it, positions follow from it, and
                ``key_padding_mask`` speaks of the new tokens. For inference: no gradient reaches cached tensors.

        Returns:
            Output shaped like ``query``, and the weights (B, Q, K) or (B, H, Q, K), or ``None``.
        """
        owner = type(self).__name__
        key = query if key is None else key
        value = key if value is None else value
        is_batched = query.dim() == 3
        require(query.dim() in (2, 3), owner, "query", "have two or three axes", query, "Add or drop the batch axis")
        if key is query and key_positions is None:
            key_positions = query_positions
        inputs = _as_batch(query, key, value, is_batched=is_batched, batch_first=self.batch_first)
        self._check_widths(*inputs)
        if cache is not None:
            given = query_positions is None and key_positions is None
            require(given, owner, "query_positions", "be left to the cache", query_positions, "Drop the positions")
            query_positions = key_positions = cache.next_positions(inputs[0].shape[1], key_padding_mask)
        content = self.project(*inputs, query_positions=query_positions, key_positions=key_positions)
        if cache is not None:
            cache.append(content.key, content.value, key_padding_mask)
            content = Heads(content.query, cache.keys, cache.values)
            key_positions, key_padding_mask = cache.positions, cache.padding
            is_causal = is_causal and content.query.shape[2] > 1  # one query at the end sees all that is cached
        mask, padding = from_multihead_convention(
            owner, attn_mask, key_padding_mask, batch=inputs[0].shape[0], num_heads=self.num_heads
        )
        result = prior_attention(
            *content,
            prior=self.prior,
            query_positions=query_positions,
            key_positions=key_positions,
            attn_mask=mask,
            key_padding_mask=padding,
            is_causal=is_causal,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=need_weights,
            backend=self.backend,
        )
        heads, weights = result if isinstance(result, tuple) else (result, None)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _check_widths(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        sides = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, tensor, width in sides:
            fits = tensor.dim() == 3 and tensor.shape[-1] == width
            require(fits, type(self).__name__, name, f"have width {width} in its last axis", tensor, "Check the inputs")

    def make_cache(self, batch_size: int, max_length: int) -> KeyValueCache:
        """An empty :class:`KeyValueCache` for this layer, ``max_length`` tokens long."""
        weight = self.out_proj.weight
        widths = (self.content_dim, self.head_dim)
        place: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        return KeyValueCache(batch_size, self.num_kv_heads, max_length, *widths, **place)

    @classmethod
    def from_multihead_attention(
        cls, attention: nn.MultiheadAttention, *, prior: LogPrior | None = None, backend: str = "auto"
    ) -> PriorAttention:
        """A layer with the weights of ``attention``; equal to it while the prior is neutral.

        Args:
            attention: The layer to convert; not changed.
            prior: Log-prior with as many heads, its lanes appended, so that no content is lost.
            backend: As in :func:`prior_attention`.

        Raises:
            NotImplementedError: If the layer appends keys (``add_bias_kv``, ``add_zero_attn``), which have no position.
        """
        if attention.bias_k is not None or attention.add_zero_attn:
            raise NotImplementedError(
                f"{cls.__name__}.from_multihead_attention: appended keys have no position and so no log-prior. "
                f"Convert a layer without add_bias_kv and add_zero_attn."
            )
        packed = attention._qkv_same_embed_dim
        weight = attention.out_proj.weight
        layer = PriorAttention(
            attention.embed_dim,
            attention.num_heads,
            kdim=None if packed else attention.kdim,
            vdim=None if packed else attention.vdim,
            prior=prior,
            dropout=attention.dropout,
            bias=attention.in_proj_bias is not None,
            batch_first=attention.batch_first,
            backend=backend,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer.train(attention.training)
        state = attention.state_dict()
        layer.in_proj.load_multihead(state)
        layer.out_proj.load_state_dict({k[9:]: v for k, v in state.items() if k.startswith("out_proj.")}, strict=False)
        return layer

    def extra_repr(self) -> str:
        """The numbers that define the layer."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"


def _as_batch(
    query: Tensor, key: Tensor, value: Tensor, *, is_batched: bool, batch_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs as (B, length, width), keeping identities, so that self-attention is still seen as such."""

    def arranged(tensor: Tensor) -> Tensor:
        if not is_batched:
            return tensor.unsqueeze(0)
        return tensor if batch_first or tensor.dim() != 3 else tensor.transpose(0, 1)

    first = arranged(query)
    second = first if key is query else arranged(key)
    return first, second, second if value is key else arranged(value)
