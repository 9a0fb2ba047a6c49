"""Peers: the layers and kernels that others would use, as each is written by its users.

Legend: B batch, H heads, L tokens, D head width, E model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.attention import Rotary
from eotattn.priors import LogPrior

__all__ = [
    "BareLayer",
    "FlashForgetting",
    "GoatLayer",
    "KeyBias",
    "Rotated",
    "TableRotary",
    "dense_bias",
    "flashbias",
    "flex",
]


class Rotated:
    """Queries and keys turned by their positions 0, 1, 2, ...: eagerly, or in one compiled kernel with cached tables.

    Args:
        width: Head width D.
        kind: ``"eager"``, operation by operation; ``"fused"``, cosines and sines looked up and applied to both sides
            by one compiled function, as fast libraries write it.
    """

    def __init__(self, width: int, *, kind: Literal["eager", "fused"]) -> None:
        self.rotary = Rotary(width)
        self.kind, self.turn = kind, torch.compile(_turn, dynamic=False)
        self.tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Turn both, (B, H, L, D), in their dtype."""
        if self.kind == "eager":
            positions = torch.arange(query.shape[2], device=query.device)
            return self.rotary(query, positions), self.rotary(key, positions)
        if self.tables is None:
            self.tables = _tables(query)
        return self.turn(query, key, *self.tables)


class TableRotary(Rotary):
    """Rotary content as training code writes it: float32 tables in buffers, positions 0, 1, 2, ... unchecked.

    Args:
        width: Head width D.
        max_length: Tokens L at most.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, max_length: int) -> None:
        super().__init__(width)
        cos, sin = _tables(torch.empty(max_length, width))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, content: Tensor, positions: object = None, *, argument: str = "positions") -> Tensor:
        """Turn (B, H, L, D) content."""
        length = content.shape[2]
        cos, sin = self.cos[:length].float(), self.sin[:length].float()
        first, second = content.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(content.dtype)


def _tables(query: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position and pair, (L, D / 2), float32."""
    half, length = query.shape[-1] // 2, query.shape[-2]
    steps = torch.arange(half, dtype=torch.float64, device=query.device) / half
    angle = torch.arange(length, dtype=torch.float64, device=query.device)[:, None] * 10_000.0**-steps
    return angle.cos().float(), angle.sin().float()


def _turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    sides = []
    for side in (query, key):
        first, second = side.float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
        sides.append(turned.to(side.dtype))
    return sides[0], sides[1]


class BareLayer(nn.Module):
    """Causal attention without a prior: fused projection, one SDPA call, output; rotary content if asked for.

    Args:
        embed_dim: Model width E.
        num_heads: Heads H.
        rotary: How queries and keys are turned, see :class:`Rotated`; ``None`` leaves them.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, rotary: Literal["eager", "fused"] | None = None) -> None:
        super().__init__()
        self.qkv, self.out = (
            nn.Linear(embed_dim, 3 * embed_dim, bias=False),
            nn.Linear(embed_dim, embed_dim, bias=False),
        )
        self.num_heads = num_heads
        self.rotary = None if rotary is None else Rotated(embed_dim // num_heads, kind=rotary)

    def forward(self, x: Tensor, *, padding: Tensor | None = None) -> Tensor:
        """Attend over (B, L, E); ``padding`` (B, L) is true where a key is padding."""
        heads = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)]
        query, key, value = heads
        if self.rotary is not None:
            query, key = self.rotary(query, key)
        mask = None
        if padding is not None:
            mask = (
                ~padding[:, None, None, :]
                & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            )
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return self.out(output.transpose(1, 2).flatten(2))


class GoatLayer(nn.Module):
    """The reference package's GPT factory, under autocast, since casting it fails.

    Args:
        embed_dim: Model width E.
        num_heads: Heads H.
        dtype: Dtype of autocast.
    """

    def __init__(self, embed_dim: int, num_heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        import goat

        self.layer, self.dtype = goat.GoatAttention.for_gpt(embed_dim, num_heads, fuse_qkv=True), dtype

    def forward(self, x: Tensor, *, padding: Tensor | None = None) -> Tensor:
        """Attend over (B, L, E); ``padding`` (B, L) is true where a key is padding."""
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.layer(x, x, x, key_padding_mask=padding, need_weights=False, is_causal=True)[0]


class FlashForgetting(nn.Module):
    """Forgetting attention as flash-linear-attention has it: its Triton kernel, which sums log gates itself.

    Needs ``fla-core`` and einops, pure Python wheels, beside Triton.

    Args:
        embed_dim: Model width E.
        num_heads: Heads H.
        bias: Of the gates, logits (H,): where they start.
    """

    def __init__(self, embed_dim: int, num_heads: int, bias: Tensor) -> None:
        super().__init__()
        from fla.ops.forgetting_attn import parallel_forgetting_attn

        self.attend = torch.compiler.disable(parallel_forgetting_attn)
        self.qkv, self.out = (nn.Linear(embed_dim, n * embed_dim, bias=False) for n in (3, 1))
        self.gate, self.num_heads = nn.Linear(embed_dim, num_heads), num_heads
        with torch.no_grad():
            self.gate.weight.zero_()
            self.gate.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over (B, L, E)."""
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        log_gates = functional.logsigmoid(self.gate(x).float())
        return self.out(self.attend(query, key, value, log_gates).flatten(2))


class KeyBias:
    """A learnable number a key, as a score modification.

    Args:
        bias: (L,) nats.
    """

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias

    def score_mod(self) -> Callable[..., Tensor]:
        """The modification that FlexAttention compiles."""
        bias = self.bias
        return lambda score, b, h, q, k: score + bias[k]


def flashbias(query: Tensor, key: Tensor, value: Tensor, prior: LogPrior) -> Tensor:
    """FlashBias' form for training: the bias factors, in the content's dtype, beside query and key of one SDPA call.

    Source:
        Wu et al. 2025 (arXiv 2505.12044), the SDPA form of their section on implementation; written from the formula.
    """
    positions = torch.arange(query.shape[2], device=query.device)
    scale = 1 / math.sqrt(query.shape[-1])
    lanes = prior.lanes(positions, positions, dtype=torch.float32, query_scale=1 / scale)
    spare = -(query.shape[-1] + lanes.num_lanes) % 8
    sides = []
    for content, lane in ((query, lanes.query), (key, lanes.key)):
        wide = functional.pad(lane.to(content.dtype), (0, spare)).expand(*content.shape[:-1], -1)
        sides.append(torch.cat([content, wide], dim=-1))
    return functional.scaled_dot_product_attention(sides[0], sides[1], value, is_causal=True, scale=scale)


def dense_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """One SDPA call with an additive (H, L, L) bias, causality included in it."""
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def flex(prior: Any, length: int, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention, compiled once for this length, causal by a block mask.

    Args:
        prior: Anything with ``score_mod()``, or ``None``.
        length: Tokens.
        device: Where.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)
    modify = None if prior is None else prior.score_mod()
    return lambda query, key, value: compiled(query, key, value, score_mod=modify, block_mask=mask)
