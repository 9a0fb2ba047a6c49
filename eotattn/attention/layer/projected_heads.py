"""ProjectedHeads: from inputs to the content of all heads, and from heads to the output.

Legend: B batch, E model width, H query heads, Hk key heads, Q queries, K keys, D content width, V value width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from eotattn.attention.layer.projections import SeparateProjections, project_packed, reset_projection
from eotattn.attention.layer.rotary import Rotary
from eotattn.checks import check_positive_int, fail, require

__all__ = ["Heads", "ProjectedHeads"]


class Heads(NamedTuple):
    """Projected content of one call: query (B, H, Q, D), key (B, Hk, K, D), value (B, Hk, K, V)."""

    query: Tensor
    key: Tensor
    value: Tensor


class ProjectedHeads(nn.Module):
    """The projections of an attention layer, with rotary content; what happens between them is up to the layer.

    Args:
        embed_dim: Model width E.
        num_heads: Query heads H; E must be a multiple.
        num_kv_heads: Key and value heads Hk, a divisor of H; by default H.
        kdim: Width of ``key`` inputs; by default E.
        vdim: Width of ``value`` inputs; by default E.
        reserved: Columns of a head that content leaves to others: D = E / H - reserved.
        rotary: :class:`Rotary` of width D for queries and keys.
        bias: Whether the projections have biases.
        make: ``device`` and ``dtype`` of the projections.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None,
        kdim: int | None,
        vdim: int | None,
        reserved: int,
        rotary: Rotary | None,
        bias: bool,
        **make: Any,
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
        self.kdim = embed_dim if kdim is None else check_positive_int(owner, "kdim", kdim)
        self.vdim = embed_dim if vdim is None else check_positive_int(owner, "vdim", vdim)
        self.head_dim = embed_dim // num_heads
        self.content_dim = self.head_dim - reserved
        rule, got = f"leave content in a head of width {self.head_dim}", f"{reserved} lanes"
        require(self.content_dim > 0, owner, "prior", rule, got, "Use fewer frequencies or lanes='appended'")
        if rotary is not None:
            is_rotary, remedy = isinstance(rotary, Rotary), "Build one of the content's width"
            require(is_rotary, owner, "rotary", "be a Rotary", rotary, remedy, error=TypeError)
            rule = f"have width {self.content_dim}"
            require(rotary.width == self.content_dim, owner, "rotary", rule, rotary.width, "Rebuild it for the content")
        self.rotary = rotary
        of_keys = self.num_kv_heads * self.content_dim
        self._widths = (num_heads * self.content_dim, of_keys, self.num_kv_heads * self.head_dim)
        self._is_packed = kdim is None and vdim is None
        if self._is_packed:  # a plain layer, so that adapters and quantisers take it for what it is
            self.in_proj: nn.Module = nn.Linear(embed_dim, sum(self._widths), bias=bias, **make)
        else:
            input_widths = (embed_dim, self.kdim, self.vdim)
            self.in_proj = SeparateProjections(input_widths, self._widths, bias=bias, **make)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **make)
        self.reset_projections()

    def reset_projections(self) -> None:
        """Xavier weights and zero biases, as in ``nn.MultiheadAttention``."""
        reset_projection(self.in_proj)
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
        key = query if key is None else key
        value = key if value is None else value
        if self._is_packed:
            flat = project_packed(self.in_proj, self._widths, query, key, value)
        else:
            flat = self.in_proj(query, key, value)
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        heads: list[Tensor] = []
        for part, count in zip(flat, counts, strict=True):
            heads.append(part.view(part.shape[0], part.shape[1], count, part.shape[2] // count).transpose(1, 2))
        rotary = self.rotary
        if rotary is not None:
            heads[0] = rotary(heads[0], query_positions, argument="query_positions")
            heads[1] = rotary(heads[1], key_positions, argument="key_positions")
        return Heads(*heads)

    def check_widths(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raise unless the inputs (B, length, width) have the widths of this layer."""
        sides = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, tensor, width in sides:
            fits = tensor.dim() == 3 and tensor.shape[-1] == width
            if not fits:
                fail(type(self).__name__, name, f"have width {width} in its last axis", tensor, "Check the inputs")
