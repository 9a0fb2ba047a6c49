"""A decoder with :class:`Rotary`, forward and backward, against the same with tables in buffers, as others write it.

Legend: B batch, L tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eotattn.attention import PriorAttention, Rotary
from eotattn.benchmarks.peers import TableRotary
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import content, measured
from eotattn.benchmarks.suites.layer import step
from eotattn.benchmarks.timing import Candidate, Row

__all__ = ["rotary"]


def rotary(config: Configuration) -> Iterator[Row]:
    """A decoder with rotary content: eager, on a GPU compiled block by block; positions left out or of every sample."""
    small, full = [(2, 128, 64, 2, 2)], [(8, 2048, 768, 12, 12), (2, 8192, 1024, 16, 6)]
    for batch, length, width, heads, layers in config.pick(small, full):
        torch.compiler.reset()
        x, candidates = content(config, batch, length, width), []
        positions = torch.arange(length, device=x.device).expand(batch, -1).contiguous()
        for is_compiled in (False, True) if config.device != "cpu" else (False,):
            suffix = ", compiled" if is_compiled else ""
            for name, turn, at in (
                ("RoPE, tables in buffers", partial(TableRotary, width // heads, length), None),
                ("eotattn, Rotary", partial(Rotary, width // heads), None),
                ("eotattn, Rotary, positions of every sample", partial(Rotary, width // heads), positions),
            ):
                make = partial(_decoder, config, width, heads, layers, turn, at, is_compiled=is_compiled)
                candidates.append(Candidate(name + suffix, partial(step, make, x)))
        size = {"batch": batch, "length": length, "width": width, "heads": heads, "layers": layers}
        yield from ({**size, "pass": "forward+backward", **row} for row in measured(candidates, config))


def _decoder(
    config: Configuration,
    width: int,
    heads: int,
    layers: int,
    turn: Callable[[], Rotary],
    positions: Tensor | None,
    *,
    is_compiled: bool,
) -> nn.Sequential:
    blocks = nn.Sequential(*(_Block(width, heads, turn(), positions) for _ in range(layers))).to(**config.place)
    for block in blocks if is_compiled else ():
        block.compile(fullgraph=True)
    return blocks


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, turn: Rotary, positions: Tensor | None) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = PriorAttention(width, heads, rotary=turn, bias=False, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.call: dict[str, Any] = {"is_causal": True, "need_weights": False, "query_positions": positions}

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, E) to (B, L, E)."""
        x = x + self.attention(self.norms[0](x), **self.call)[0]
        return x + self.mlp(self.norms[1](x))
