"""Time and memory of training steps of decoders that differ in their attention, in turn in one process.

Legend: B batch, H heads, L tokens, D head width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention import PriorAttention, Rotary
from eotattn.experiments.device import training_device
from eotattn.experiments.networks import Decoder, DecoderConfig
from eotattn.experiments.records import Row

__all__ = ["FusedRotary", "SpeedVariant", "measure_training_speed", "speed_variants"]


class FusedRotary(Rotary):
    """Rotary positions as fast libraries write them: tables made once, the turn one fused kernel where one is compiled.

    Args:
        width: Head width of queries and keys.
        max_length: Positions are integers below it.

    Example:
        >>> content, positions = torch.randn(1, 2, 5, 4), torch.arange(5)
        >>> torch.allclose(FusedRotary(4, max_length=8)(content, positions), Rotary(4)(content, positions), atol=1e-6)
        True
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, *, max_length: int, fuse: bool = False) -> None:
        super().__init__(width)
        half = width // 2
        angle = torch.arange(max_length, dtype=torch.float64)[:, None] * self.base ** -(torch.arange(half) / half)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        self.turn: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(_turn, dynamic=False) if fuse else _turn

    def forward(
        self, content: Tensor, positions: Tensor | range | None = None, *, argument: str = "positions"
    ) -> Tensor:
        """Turn ``content`` (B, H, L, D) by its positions (L,), tokens, which are not checked."""
        if positions is None:
            positions = range(content.shape[2])
        at = slice(positions.start, positions.stop) if isinstance(positions, range) else positions
        return self.turn(content, self.cos[at], self.sin[at])


def _turn(content: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = content.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(content.dtype)


@dataclass(frozen=True)
class SpeedVariant:
    """One decoder to time.

    Args:
        name: For tables.
        attention: A name in :data:`~eotattn.experiments.networks.ATTENTION_KINDS`.
        rotary: ``"fused"`` replaces the rotation by :class:`FusedRotary`.
        lanes: ``"reserved"`` takes the prior's lanes from the head width, as the paper does.
        backend: Of every attention call, see :func:`~eotattn.attention.prior_attention`.
        compiled: Compile every block with ``torch.compile``.
    """

    name: str
    attention: str
    rotary: str = "plain"
    lanes: str = "appended"
    backend: str = "auto"
    compiled: bool = False

    def build(self, sizes: DecoderConfig, device: torch.device, lane_dtype: torch.dtype) -> Decoder:
        """The decoder, on the device, in training mode."""
        config = replace(sizes, attention=self.attention)
        network = Decoder(config)
        for block in network.blocks:
            if self.lanes == "reserved":
                prior = block.attention.prior
                sizes_of_layer = (config.embed_dim, config.num_heads)
                options: dict[str, Any] = {"lanes": "reserved", "lane_dtype": lane_dtype, "batch_first": True}
                block.attention = PriorAttention(*sizes_of_layer, prior=prior, **options)
            if self.rotary == "fused":
                fuse = device.type == "cuda" and not self.compiled  # a compiled block fuses the turn by itself
                block.attention.rotary = FusedRotary(config.head_dim, max_length=config.train_length, fuse=fuse)
            block.attention.backend = self.backend
        network.to(device)
        if self.compiled:
            for block in network.blocks:
                block.compile()
        return network


def speed_variants(*, compiled: bool) -> list[SpeedVariant]:
    """What figure 4 times; the first is the baseline.

    Args:
        compiled: Also with compiled blocks.
    """
    eager = [
        SpeedVariant("RoPE, fused", "rope", rotary="fused"),
        SpeedVariant("RoPE, naive", "rope", backend="reference"),
        SpeedVariant("GOAT, lanes appended", "paper_goat"),
        SpeedVariant("GOAT, lanes reserved", "paper_goat", lanes="reserved"),
    ]
    again = [replace(one, name=f"{one.name}, compiled", compiled=True) for one in eager if one.backend == "auto"]
    return eager + (again if compiled else [])


@dataclass(eq=False)
class _Step:
    """A network, its optimiser and one training step on a fixed batch."""

    network: Decoder
    tokens: Tensor
    precision: str

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)

    def __call__(self) -> None:
        inputs, targets = self.tokens[:, :-1], self.tokens[:, 1:]
        with torch.autocast(self.tokens.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.network(inputs)
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()


def measure_training_speed(
    variants: Sequence[SpeedVariant], sizes: DecoderConfig, *, batch_size: int, rounds: int, precision: str
) -> list[Row]:
    """Time whole training steps: forward, backward, clipping, AdamW; every variant once in every round.

    Args:
        variants: What to time, from :func:`speed_variants`.
        sizes: Sizes of the decoders.
        batch_size: Windows of ``sizes.train_length`` tokens a step.
        rounds: Timed steps of each.
        precision: ``"no"`` or ``"bf16"``.

    Returns:
        Rows ``quantity``, ``unit``, ``value``, ``variant``: median, quartiles of a step's time, tokens a second, and on
        a GPU the peak of memory above what was there before the decoder was built, weights and optimiser included.
    """
    device = training_device()
    lane_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shape = (batch_size, sizes.train_length + 1)
    tokens = torch.randint(sizes.vocabulary_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    steps: dict[str, _Step] = {}
    peaks: dict[str, float | None] = {}
    failures: list[Row] = []
    for variant in variants:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        try:
            step = _Step(variant.build(sizes, device, lane_dtype), tokens, precision)
            for _ in range(3):
                step()
        except Exception as error:  # a compiler may fail in any way, and the table says how
            reason = f"{type(error).__name__}: {str(error).strip()[:160]}"
            failures.append({"panel": "f", "variant": variant.name, "quantity": "failure", "unit": "", "value": reason})
            continue
        peaks[variant.name] = _peak_mib(step, before) if device.type == "cuda" else None
        steps[variant.name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_seconds(step, device))
    found = [row for name in steps for row in _rows(name, times[name], peaks[name], tokens[:, 1:].numel())]
    return found + failures


def _peak_mib(step: _Step, before: int) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _seconds(step: _Step, device: torch.device) -> float:
    """Seconds of a step; on a GPU of three in a row, where the host may run ahead as in training."""
    calls = 3 if device.type == "cuda" else 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _rows(name: str, times: Sequence[float], peak_mib: float | None, tokens: int) -> list[Row]:
    middle = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    found = [
        ("step_seconds", "seconds", middle),
        ("step_seconds_low", "seconds", low),
        ("step_seconds_high", "seconds", high),
        ("throughput", "tokens per second", tokens / middle),
    ]
    if peak_mib is not None:
        found.append(("peak_memory", "MiB", peak_mib))
    return [{"panel": "f", "variant": name, "quantity": q, "unit": u, "value": v} for q, u, v in found]
