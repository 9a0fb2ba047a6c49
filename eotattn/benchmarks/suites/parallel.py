"""Training steps of a decoder of 110 M parameters: one GPU, and all of them with the same batch and the same loss.

Legend: B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.launch import measure_together
from eotattn.benchmarks.suites.training_step import FULL, SMALL, Sizes, attention_layers, build_decoder
from eotattn.benchmarks.timing import Candidate, Row, measure

__all__ = ["parallel"]

#: Windows of a process's part of the batch as ``batch``; the vocabulary of prepared books.
LARGE = replace(FULL, batch=16, vocabulary=16_384)
#: The layers that are compared.
NAMES = ("RoPE in plain PyTorch", "eotattn, GOAT, reserved", "eotattn, GOAT, appended")


def parallel(config: Configuration) -> Iterator[Row]:
    """Tokens a second, efficiency and memory of data parallel training, and the link between the GPUs.

    One process computes the batch in as many parts as there are processes, then steps; processes compute one part each
    and step together. Efficiency is the time of one, over the time of all times their number. ``error`` is how far
    the last loss is from that of one process, relative. On a CPU two processes over gloo stand for GPUs.
    """
    count = torch.cuda.device_count() if config.device == "cuda" else 2
    if count == 1:
        yield {"name": "data parallel", "failure": f"it shares work between GPUs; got one on {config.device}"}
        return
    yield from measure_together(partial(_work, count=count), config, count)


def _work(config: Configuration, count: int) -> Iterator[Row]:
    """Measure in step with the other processes; those of number one and more leave the single process's part out."""
    (sizes,) = config.pick([SMALL], [LARGE])
    makers = attention_layers(sizes)
    for name in NAMES:
        torch.compiler.reset()
        at = {"quantity": "training step", "batch": count * sizes.batch, "length": sizes.length, "layers": sizes.layers}
        at |= {"width": sizes.width, "heads": sizes.heads}
        alone = _measured(_Training(makers[name], sizes, config, 1, count), config) if dist.get_rank() == 0 else {}
        # The others compile meanwhile, and wait where the decoder is shared.
        shared = _measured(_Training(makers[name], sizes, config, count, 1), config)
        if "failure" not in {*alone, *shared} and alone:
            shared["efficiency"] = alone["median_ms"] / (count * shared["median_ms"])
            shared["error"] = abs(shared["loss"] - alone["loss"]) / alone["loss"]
        yield {**at, "processes": 1, "name": name, **alone}
        yield {**at, "processes": count, "name": name, **shared}
    yield _link(config, count, _num_parameters(build_decoder(makers[NAMES[0]], sizes, config)))


class _Training:
    """A decoder and its training on one batch of tokens, in parts of equal size, ``count`` of them side by side."""

    def __init__(
        self, make: Callable[[], nn.Module], sizes: Sizes, config: Configuration, count: int, num_parts: int
    ) -> None:
        self.config, self.count, self.loss = config, count, torch.zeros(())
        self.model: nn.Module = build_decoder(make, sizes, config)
        self.num_parameters = _num_parameters(self.model)
        random = torch.Generator().manual_seed(config.seed)
        windows = (count * num_parts * sizes.batch, sizes.length + 1)
        tokens = torch.randint(sizes.vocabulary, windows, generator=random).to(config.device)
        self.num_tokens = windows[0] * sizes.length
        mine = tokens.chunk(count)[dist.get_rank()] if count > 1 else tokens
        self.parts = mine.chunk(num_parts)
        if count > 1:
            self._loss(self.parts[0]).backward()  # compiles the blocks whole, where they would be cut into buckets
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def __call__(self) -> None:
        """One step; gradients are exchanged while the last part's are computed."""
        self.optimizer.zero_grad()
        losses = []
        for k, part in enumerate(self.parts):
            waits = isinstance(self.model, DistributedDataParallel) and k + 1 < len(self.parts)
            with self.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                loss = self._loss(part) / len(self.parts)
                loss.backward()
            losses.append(loss.detach())
        self.optimizer.step()
        self.loss = torch.stack(losses).sum()

    def mean_loss(self) -> float:
        """Of all processes, in the last step, nats a token."""
        if self.count > 1:
            dist.all_reduce(self.loss)
        return float(self.loss) / self.count

    def _loss(self, part: Tensor) -> Tensor:
        device, dtype = torch.device(self.config.device).type, self.config.place["dtype"]
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = self.model(part[:, :-1])
            return functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _measured(training: _Training, config: Configuration) -> Row:
    """Time of a step and what follows from it; memory is all that the process holds at the peak."""
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    (row,) = measure([Candidate("", lambda: training)], device=device, rounds=config.rounds, calls=1)
    if "failure" in row:
        return {"failure": row["failure"]}
    found: Row = {name: row[name] for name in ("median_ms", "low_ms", "high_ms")}
    found |= {"tokens_per_second": training.num_tokens / row["median_ms"] * 1e3, "loss": training.mean_loss()}
    found["parameters"] = training.num_parameters
    if device.type == "cuda":
        found["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found["launches"] = _num_launches(training) if training.count == 1 else None
    return found


def _num_launches(step: Callable[[], Any]) -> int:
    """Kernels that one call puts on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in record.events() or ())


def _link(config: Configuration, count: int, numbers: int) -> Row:
    """The sum of all gradients over the processes by itself: its time, and the bytes that each sends a second."""
    gradients = torch.zeros(numbers, device=config.device)
    candidate = Candidate("all-reduce of the gradients", lambda: partial(dist.all_reduce, gradients))
    (row,) = measure([candidate], device=torch.device(config.device), rounds=config.rounds)
    if "failure" in row:
        return row
    sent = 2 * (count - 1) / count * gradients.nbytes
    kept = {name: row[name] for name in ("name", "median_ms", "low_ms", "high_ms")}
    rate = sent / row["median_ms"] * 1e3
    return {"quantity": "link", "processes": count, **kept, "bytes": gradients.nbytes, "bytes_per_second": rate}
