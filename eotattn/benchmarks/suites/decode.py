"""One new token against a cache: call by call, compiled, and as a recorded graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention import KeyValueCache, StaticCache, prior_attention
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import gpt_prior, measured, trained
from eotattn.benchmarks.timing import Candidate, Row
from eotattn.compat import lasting
from eotattn.kernels.sdpa import WIDTH_STEP
from eotattn.priors import LogPrior, goat_prior

__all__ = ["decode", "decode_step"]

#: Batch, heads, key heads, slots of the cache, head width.
Shape = tuple[int, int, int, int, int]
#: A step, and what takes the cache back to where it began.
Arm = tuple[Callable[[], Tensor], Callable[[], Any]]

#: Steps from where a cache begins to where it is full, where it is not short.
MOST_ROOM = 64


def decode(config: Configuration) -> Iterator[Row]:
    """One new token against a cache, grouped queries: the attention of a decoding step.

    Three kinds of step, each beside SDPA (``scaled_dot_product_attention``) with a bare append of the same kind:
    ``eager`` calls; ``compiled`` ones (on a GPU ``mode="reduce-overhead"``, on a CPU traced alone); and, on a GPU,
    ``recorded`` ones, compiled and captured in one CUDA graph, which leaves the host out.
    """
    small = [(1, 4, 2, 64, 32)]
    full = [(batch, 32, 8, length, 128) for length in (2048, 32768) for batch in (1, 8)] + [(8, 32, 8, 32768, 64)]
    for shape in config.pick(small, full):
        yield from decode_step(config, shape)


def decode_step(config: Configuration, shape: Shape) -> Iterator[Row]:
    """The step at one shape, kind by kind."""
    heads = shape[1]
    priors = {
        "recency + sink": trained(gpt_prior(heads), config),
        "GOAT, 4 frequencies": trained(goat_prior(heads, num_frequencies=4), config),
    }
    for kind in ("eager", "compiled", *(["recorded"] if config.place["device"].type == "cuda" else [])):
        torch.compiler.reset()
        with torch.inference_mode(kind == "eager"), torch.no_grad():
            found = measured(_candidates(config, shape, kind, priors), config)
        names = ("batch", "heads", "kv_heads", "length", "width")
        yield from ({**dict(zip(names, shape, strict=True)), "pass": f"decode, {kind}", **row} for row in found)


def _candidates(config: Configuration, shape: Shape, kind: str, priors: dict[str, LogPrior]) -> list[Candidate]:
    def candidate(name: str, arm: Callable[..., Arm], *arguments: Any) -> Candidate:
        return Candidate(name, lambda: _stepping(kind, shape, *arm(config, shape, kind, *arguments)))

    yes, kv_heads, width = kind != "eager", shape[2], shape[-1]
    candidates = [
        candidate("SDPA, appending to a cache", _bare),
        *([candidate("SDPA, appending, free slots masked", _bare, 0, 0, True)] if yes else []),
        candidate("eotattn, no prior", _cached, 0, None),
    ]
    counts = dict[int, None]()
    for name, prior in priors.items():
        lanes = -(-prior.num_lanes(config.place["dtype"], kv_heads) // WIDTH_STEP) * WIDTH_STEP
        counts[lanes] = None
        if lanes < width:
            candidates.append(candidate(f"eotattn, {name}, reserved", _cached, -lanes, prior))
        candidates.append(candidate(f"eotattn, {name}, appended", _cached, 0, prior))
    for count in counts:
        candidates.append(candidate(f"SDPA, keys of {count} columns more", _bare, count))
        candidates.append(candidate(f"SDPA, keys and values of {count} columns more", _bare, count, count))
    return candidates


@dataclass
class _Step:
    """A step, over and over; begins again when the cache is full, and holds what a recorded graph reads by address."""

    run: Callable[[], Any]
    rewind: Callable[[], Any]
    room: int
    attend: Callable[[], Tensor]
    count: int = 0

    def __call__(self) -> Any:
        if self.count == self.room:
            self.rewind()
            self.count = 0
        self.count += 1
        return self.run()


def _stepping(kind: str, shape: Shape, attend: Callable[[], Tensor], rewind: Callable[[], Any]) -> _Step:
    """The step in its kind, at the beginning."""
    on_gpu = torch.cuda.is_available() and attend().is_cuda
    rewind()
    run: Callable[[], Any] = attend
    if kind == "compiled":
        options: dict[str, Any] = {"mode": "reduce-overhead"} if on_gpu else {"backend": "aot_eager"}
        traced = torch.compile(attend, fullgraph=True, **options)
        run = lambda: (torch.compiler.cudagraph_mark_step_begin(), traced())  # noqa: E731
    elif kind == "recorded":
        run = _recorded(torch.compile(attend, fullgraph=True))
        rewind()
    return _Step(run, rewind, _room(shape), attend)


def _recorded(step: Callable[[], Tensor]) -> Callable[[], None]:
    """The step as one CUDA graph, which does not keep alive what the step reads."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _room(shape: Shape) -> int:
    return min(MOST_ROOM, shape[3] // 4)


def _sides(config: Configuration, shape: Shape, of_keys: int, of_values: int) -> list[Tensor]:
    """Query of one token, keys and values of all slots, so many columns wider than the head."""
    batch, heads, kv_heads, length, width = shape
    generator = torch.Generator(config.device).manual_seed(config.seed)  # on the device: these are large
    shapes = ((heads, 1, width + of_keys), (kv_heads, length, width + of_keys), (kv_heads, length, width + of_values))
    return [torch.randn(batch, *one, generator=generator, **config.place) for one in shapes]


def _bare(
    config: Configuration, shape: Shape, kind: str, of_keys: int = 0, of_values: int = 0, is_masked: bool = False
) -> Arm:
    """SDPA over all slots, with the token copied into its own: by slices, and in graphs by an index on the device."""
    query, key, value = _sides(config, shape, of_keys, of_values)
    new, start = (key[:, :, -1:].clone(), value[:, :, -1:].clone()), shape[3] - _room(shape)
    if kind == "eager":
        slot = start

        def copying() -> Tensor:
            nonlocal slot
            key[:, :, slot : slot + 1], value[:, :, slot : slot + 1] = new
            slot += 1
            return functional.scaled_dot_product_attention(query, key[:, :, :slot], value[:, :, :slot], enable_gqa=True)

        def to_start() -> None:
            nonlocal slot
            slot = start

        return copying, to_start

    at, slots = torch.full((1,), start, device=key.device), torch.arange(shape[3], device=key.device)
    for buffer in (at, key, value):
        lasting(buffer)

    def indexing() -> Tensor:
        key.index_copy_(2, at, new[0])
        value.index_copy_(2, at, new[1])
        mask = (slots <= at).unsqueeze(0) if is_masked else None
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        at.add_(1)
        return output

    return indexing, lambda: at.fill_(start)


def _cached(config: Configuration, shape: Shape, kind: str, of_keys: int, prior: LogPrior | None) -> Arm:
    """Ours: the cache of calls, or the one whose steps can be recorded."""
    batch, _, kv_heads, length, width = shape
    query, key, value = _sides(config, shape, of_keys, 0)
    cache = (KeyValueCache if kind == "eager" else StaticCache)(
        batch, kv_heads, length, width + of_keys, width, prior=prior, **config.place
    )
    start = length - _room(shape)
    cache.append(key[:, :, :start], value[:, :, :start])
    new = key[:, :, -1:].clone(), value[:, :, -1:].clone()

    def attend() -> Tensor:
        output = prior_attention(query, *new, prior=prior, cache=cache, is_causal=True, backend="sdpa")
        assert isinstance(output, Tensor)
        return output

    return attend, lambda: cache.crop(start)
