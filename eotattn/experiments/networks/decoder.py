"""A decoder whose attention is chosen by name.

Legend: B batch, L tokens, E embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.attention import KeyValueCache
from eotattn.checks import check_choice
from eotattn.experiments.networks.attention_kinds import ATTENTION_KINDS, DecoderConfig, sinusoids
from eotattn.experiments.networks.rotations import StretchedRotary

__all__ = ["Decoder"]

#: Standard deviation of embeddings at the start, and amplitude of fixed waves added to them: neither drowns the other.
EMBEDDING_SPREAD = 0.1


class GatedMlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), as many parameters as an ungated one of four times the width.

    Source: Shazeer 2020 (arXiv 2002.05202).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 64 * -(-8 * width // (3 * 64))
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, L, E) to (B, L, E)."""
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        mapped: Tensor = self.down(functional.silu(gate) * up)
        return mapped


def make_norm(config: DecoderConfig) -> nn.Module:
    """The normalisation of a decoder's blocks and of its readout."""
    return nn.RMSNorm(config.embed_dim, eps=1e-6) if config.block == "llama" else nn.LayerNorm(config.embed_dim)


class Block(nn.Module):
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.attention_norm = make_norm(config)
        self.attention = config.kind.build(config)
        self.mlp_norm = make_norm(config)
        self.mlp: nn.Module
        if config.block == "llama":
            self.mlp = GatedMlp(width)
        else:
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor | None,
        cache: KeyValueCache | None = None,
        hidden_keys: Tensor | None = None,
    ) -> Tensor:
        """Map (B, L, E) hidden states at (L,) positions, or at those that follow the cache's, to (B, L, E)."""
        normed = self.attention_norm(hidden)
        attended, _ = self.attention(
            normed,
            need_weights=False,
            attn_mask=hidden_keys,
            is_causal=True,
            query_positions=positions,
            cache=cache,
        )
        hidden = hidden + attended
        return hidden + self.mlp(self.mlp_norm(hidden))


class Decoder(nn.Module):
    """A decoder-only transformer: tokens in, logits of the next token out.

    All kinds of attention have the same content path and the same parameters, apart from the prior's own and the table
    of learned positions.

    Args:
        config: Sizes and the name of the attention.

    Example:
        >>> network = Decoder(DecoderConfig("alibi", num_layers=1, embed_dim=16, num_heads=2, train_length=8))
        >>> network(torch.zeros(1, 5, dtype=torch.long)).shape
        torch.Size([1, 5, 256])
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.embed_dim)
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.blocks = cast("Sequence[Block]", blocks)
        self.norm = make_norm(config)
        self.readout = nn.Linear(config.embed_dim, config.vocabulary_size, bias=False)
        self.position_embedding: nn.Embedding | None = None
        if config.kind.embedding == "learned":
            self.position_embedding = nn.Embedding(config.train_length, config.embed_dim)
            nn.init.normal_(self.position_embedding.weight, std=EMBEDDING_SPREAD)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_SPREAD)
        nn.init.normal_(self.readout.weight, std=config.embed_dim**-0.5 / 4)

    def forward(
        self,
        tokens: Tensor,
        *,
        num_targets: int | None = None,
        caches: Sequence[KeyValueCache] | None = None,
        hidden_keys: Tensor | None = None,
    ) -> Tensor:
        """Predict the token after every token.

        Returns:
            (B, L, V) logits, or (B, num_targets, V).
        """
        if caches is None:
            hidden, positions = self._embed(tokens)
        else:
            hidden, positions = self.embedding(tokens), None
        for k, block in enumerate(self.blocks):
            hidden = block(hidden, positions, None if caches is None else caches[k], hidden_keys)
        if num_targets is not None:
            hidden = hidden[:, -num_targets:]
        return self.readout(self.norm(hidden))

    def make_caches(self, batch_size: int, max_length: int) -> list[KeyValueCache]:
        """Empty caches, one a block, for sequences of up to ``max_length`` tokens."""
        kind, rotary = self.config.kind, self.blocks[0].attention.rotary
        if kind.embedding is not None or kind.interpolated or isinstance(rotary, StretchedRotary):
            raise NotImplementedError(
                f"Decoder.make_caches: attention {self.config.attention!r} does not read positions token by token. "
                f"Read the whole sequence at every step, or choose another attention."
            )
        return [block.attention.make_cache(batch_size, max_length) for block in self.blocks]

    def read_as(self, attention: str) -> Decoder:
        """A decoder with these weights whose attention is another kind that is trained as this one."""
        known = tuple(name for name, kind in ATTENTION_KINDS.items() if kind.trained_as == self.config.attention)
        check_choice("Decoder.read_as", "attention", attention, (self.config.attention, *known))
        reader = Decoder(replace(self.config, attention=attention))
        reader.load_state_dict(self.state_dict())
        return reader.to(self.embedding.weight.device).train(self.training)

    def attention_inputs(self, tokens: Tensor) -> list[Tensor]:
        """What every block's attention reads, (B, L, E) a block: the door through which diagnostics look."""
        hidden, positions = self._embed(tokens)
        inputs = []
        for block in self.blocks:
            inputs.append(block.attention_norm(hidden))
            hidden = block(hidden, positions)
        return inputs

    def positions(self, length: int, device: torch.device) -> Tensor | None:
        """(L,) positions that every layer gets, tokens; None stands for 0 ... L - 1."""
        positions = self.config.kind.positions(length, self.config)
        return None if positions is None else positions.to(device)

    def _embed(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden, length = self.embedding(tokens), tokens.shape[1]
        if self.config.kind.embedding == "sinusoidal":
            hidden = hidden + EMBEDDING_SPREAD * sinusoids(length, self.config.embed_dim).to(hidden)
        if self.position_embedding is not None:
            last = self.config.train_length - 1
            hidden = hidden + self.position_embedding(torch.arange(length, device=tokens.device).clamp(max=last))
        return hidden, self.positions(length, tokens.device)
