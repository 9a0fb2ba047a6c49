"""PriorAttention: projections around :func:`prior_attention`, called like ``nn.MultiheadAttention``.

Legend: B batch, E model width, H query heads, Hk key heads, Q queries, K keys, D content width, V value width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eotattn.attention.backends import BACKENDS
from eotattn.attention.functional import prior_attention
from eotattn.attention.masks import from_multihead_convention
from eotattn.attention.positions import resolve_positions
from eotattn.attention.rotary import Rotary
from eotattn.checks import check_choice, check_positive_int, require
from eotattn.priors import LogPrior, goat_prior

__all__ = ["GoatAttention", "Heads", "PriorAttention"]


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
            takes the prior's float32 lanes out of the head width, so that the call stays as wide as the head. No
            projection row is dead either way: projections are as wide as the content.
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
        self.num_kv_heads = check_positive_int(owner, "num_kv_heads", num_kv_heads or num_heads)
        divides = embed_dim % num_heads == 0
        require(divides, owner, "embed_dim", f"be a multiple of num_heads ({num_heads})", embed_dim, "Change one")
        rule = f"divide num_heads ({num_heads})"
        require(num_heads % self.num_kv_heads == 0, owner, "num_kv_heads", rule, num_kv_heads, "Choose a divisor")
        require(0 <= dropout < 1, owner, "dropout", "lie in [0, 1)", dropout, "Pass a probability")
        self.backend = check_choice(owner, "backend", backend, ("auto", *BACKENDS))
        self.lanes = check_choice(owner, "lanes", lanes, ("appended", "reserved"))
        if prior is not None:
            have = getattr(prior, "num_heads", prior)
            require(have == num_heads, owner, "prior", f"have {num_heads} heads", have, "Build it for query heads")
        self.head_dim = embed_dim // num_heads
        self.content_dim = self._content_dim(prior)
        if rotary is not None:
            rule = f"have width {self.content_dim}"
            require(rotary.width == self.content_dim, owner, "rotary", rule, rotary.width, "Rebuild it for the content")
        self.scale = 1 / math.sqrt(self.content_dim)
        self.dropout, self.batch_first = dropout, batch_first
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.prior, self.rotary = prior, rotary
        make = {"bias": bias, "device": device, "dtype": dtype}
        query_width, key_width = num_heads * self.content_dim, self.num_kv_heads * self.content_dim
        value_width = self.num_kv_heads * self.head_dim
        self._widths = (query_width, key_width, value_width)
        self.is_packed = kdim is None and vdim is None
        if self.is_packed:
            self.in_proj = nn.Linear(embed_dim, sum(self._widths), **make)  # type: ignore[arg-type]
        else:
            self.q_proj = nn.Linear(embed_dim, query_width, **make)  # type: ignore[arg-type]
            self.k_proj = nn.Linear(self.kdim, key_width, **make)  # type: ignore[arg-type]
            self.v_proj = nn.Linear(self.vdim, value_width, **make)  # type: ignore[arg-type]
        self.out_proj = nn.Linear(embed_dim, embed_dim, **make)  # type: ignore[arg-type]
        self.reset_parameters()

    def _content_dim(self, prior: LogPrior | None) -> int:
        if self.lanes == "appended" or prior is None:
            return self.head_dim
        owner = type(self).__name__
        require(prior.has_lanes, owner, "prior", "have lanes to reserve", type(prior).__name__, "Use lanes='appended'")
        width = self.head_dim - prior.num_lanes(torch.float32)
        rule = f"leave content in a head of width {self.head_dim}"
        got = f"{prior.num_lanes(torch.float32)} lanes"
        require(width > 0, owner, "prior", rule, got, "Use fewer frequencies or lanes='appended'")
        return width

    def reset_parameters(self) -> None:
        """Initialise the projections as ``nn.MultiheadAttention`` does (Xavier, zero biases); reset the prior."""
        inputs = [self.in_proj] if self.is_packed else [self.q_proj, self.k_proj, self.v_proj]
        for projection in inputs:
            nn.init.xavier_uniform_(projection.weight)
        for projection in (*inputs, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.prior is not None:
            self.prior.reset_parameters()

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
        key = query if key is None else key
        value = key if value is None else value
        if self.is_packed and key is query and value is query:
            flat = list(self.in_proj(query).split(self._widths, dim=-1))
        else:
            flat = self._project_apart(query, key, value)
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

    def _project_apart(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if not self.is_packed:
            return [self.q_proj(query), self.k_proj(key), self.v_proj(value)]
        weights = self.in_proj.weight.split(self._widths)
        biases = (None,) * 3 if self.in_proj.bias is None else self.in_proj.bias.split(self._widths)
        inputs = (query, key, value)
        return [nn.functional.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]

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
            key_positions: (K,) or (B, K), likewise; by default those of the query in self-attention.

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
        content = self.project(*inputs, query_positions=query_positions, key_positions=key_positions)
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

    def extra_repr(self) -> str:
        """The numbers that define the layer."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"


def _as_batch(
    query: Tensor, key: Tensor, value: Tensor, *, is_batched: bool, batch_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs as (B, length, width), keeping identities, so that self-attention is still seen as such."""
    unique: dict[int, Tensor] = {}

    def arranged(tensor: Tensor) -> Tensor:
        if id(tensor) not in unique:
            batched = tensor if is_batched else tensor.unsqueeze(0)
            swap = is_batched and not batch_first and tensor.dim() == 3
            unique[id(tensor)] = batched.transpose(0, 1) if swap else batched
        return unique[id(tensor)]

    return arranged(query), arranged(key), arranged(value)


class GoatAttention(PriorAttention):
    """The paper's layer: :class:`PriorAttention` with :func:`goat_prior`, its lanes reserved from the head width.

    Args:
        embed_dim: Model width E.
        num_heads: Query heads H.
        num_kv_heads: Key and value heads; by default H.
        num_frequencies: Frequencies R of the relative part; the prior takes 2 R + 2 lanes of the head.
        length_scale: Tokens over which u(j) varies; about the training length.
        init: ``"alibi"`` or ``"neutral"``, as in :func:`goat_prior`.
        dropout: Probability of dropping a weight in training.
        bias: Whether the projections have biases.
        batch_first: Whether inputs are (B, length, E).

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), section 3.

    Example:
        >>> layer = GoatAttention(embed_dim=64, num_heads=4, num_frequencies=3)
        >>> layer.content_dim, layer.head_dim
        (8, 16)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        num_frequencies: int = 4,
        length_scale: float = 2048.0,
        init: str = "alibi",
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            prior=goat_prior(num_heads, num_frequencies=num_frequencies, length_scale=length_scale, init=init),
            lanes="reserved",
            dropout=dropout,
            bias=bias,
            batch_first=batch_first,
        )
