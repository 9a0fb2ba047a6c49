"""A training step of a decoder of 125 M parameters, compiled block by block, against RoPE in plain PyTorch.

Legend: B batch, L tokens, E model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.attention import PriorAttention, Rotary
from eotattn.benchmarks import peers
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.layer import CausalLayer
from eotattn.benchmarks.timing import Candidate, Row, measure
from eotattn.priors import ForgettingPrior, LogPrior, goat_prior

__all__ = ["FULL", "SMALL", "Sizes", "attention_layers", "build_decoder", "training"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder and of its batches."""

    layers: int
    width: int
    heads: int
    length: int
    batch: int
    vocabulary: int


SMALL, FULL = Sizes(2, 64, 2, 32, 2, 50), Sizes(12, 768, 12, 2048, 8, 8192)


def training(config: Configuration) -> Iterator[Row]:
    """Whole steps: forward and backward under bfloat16 autocast, fused AdamW; eager on a CPU, compiled on a GPU."""
    (sizes,) = config.pick([SMALL], [FULL])
    torch.compiler.reset()
    candidates = [
        Candidate(name, partial(_step, make, sizes, config)) for name, make in attention_layers(sizes).items()
    ]
    found = measure(candidates, device=torch.device(config.device), rounds=config.rounds, calls=2)
    at = {"quantity": "training step", "length": sizes.length, "batch": sizes.batch, "layers": sizes.layers}
    yield from ({**at, "width": sizes.width, "heads": sizes.heads, **row} for row in found)


def attention_layers(sizes: Sizes) -> dict[str, Callable[[], nn.Module]]:
    """Attention layers by name; the first is the baseline."""
    width, heads = sizes.width, sizes.heads

    def ours(**keywords: Any) -> nn.Module:
        return CausalLayer(PriorAttention(width, heads, bias=False, batch_first=True, **keywords))

    def goat(gates: LogPrior | None = None, **keywords: Any) -> nn.Module:
        prior: LogPrior = goat_prior(heads, num_frequencies=4, length_scale=float(sizes.length))
        return ours(prior=prior if gates is None else prior + gates, **keywords)

    reserved: dict[str, Any] = {"lanes": "reserved", "lane_dtype": torch.bfloat16}
    gates = partial(ForgettingPrior, width, heads)
    return {
        "RoPE in plain PyTorch": lambda: ours(rotary=peers.TableRotary(width // heads, sizes.length)),
        "no position": lambda: peers.BareLayer(width, heads),
        "eotattn, Rotary": lambda: ours(rotary=Rotary(width // heads)),
        "eotattn, GOAT, reserved": lambda: goat(**reserved),
        "eotattn, GOAT, appended": goat,
        "eotattn, gates, reserved": lambda: ours(prior=gates(), **reserved),
        "eotattn, GOAT and gates, reserved": lambda: goat(gates=gates(), **reserved),
        "flash-linear-attention, gates": lambda: peers.FlashForgetting(width, heads, gates().bias.detach()),
    }


class _Block(nn.Module):
    """One pre-norm block."""

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))


def build_decoder(make: Callable[[], nn.Module], sizes: Sizes, config: Configuration) -> nn.Sequential:
    """A decoder with such layers, whose blocks are compiled on a GPU: (B, L) tokens to (B, L, V) logits."""
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    blocks = [_Block(make(), sizes.width) for _ in range(sizes.layers)]
    ends = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, sizes.vocabulary, bias=False)
    decoder = nn.Sequential(nn.Embedding(sizes.vocabulary, sizes.width), *blocks, *ends).to(device)
    if device.type != "cpu":
        for block in blocks:
            block.compile(fullgraph=not isinstance(block.attention, peers.FlashForgetting))
    return decoder


def _step(make: Callable[[], nn.Module], sizes: Sizes, config: Configuration) -> Callable[[], Tensor]:
    """The function that trains a decoder with such layers by one step on a fixed batch."""
    device, decoder = torch.device(config.device), build_decoder(make, sizes, config)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(sizes.vocabulary, (sizes.batch, sizes.length + 1)).to(device)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = decoder(tokens[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
