"""One new token against a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention import KeyValueCache, prior_attention
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import gpt_prior, measured, trained
from eotattn.benchmarks.timing import Candidate, Row
from eotattn.kernels.sdpa import WIDTH_STEP, kernel_width
from eotattn.priors import LogPrior

__all__ = ["decode", "decode_step"]


Shape = tuple[int, int, int, int, int]


def decode(config: Configuration) -> Iterator[Row]:
    """One new token against a cache, grouped queries: the attention of a decoding step."""
    small, full = [(1, 4, 2, 64, 32)], [(8, 32, 8, 2048, 128), (8, 32, 8, 32768, 128), (8, 32, 8, 32768, 64)]
    for shape in config.pick(small, full):
        yield from decode_step(config, shape)


def decode_step(config: Configuration, shape: Shape) -> list[Row]:
    """The step at one shape: B, H, Hk, tokens in the cache, head width D."""
    _, heads, kv_heads, _, width = shape
    prior = trained(gpt_prior(heads), config)
    lanes = prior.num_lanes(config.place["dtype"], kv_heads)
    lanes = -(-lanes // WIDTH_STEP) * WIDTH_STEP
    wide = kernel_width(width + lanes, config.place["device"])
    candidates = [
        Candidate("SDPA, no prior, appending to a cache", partial(_bare, config, shape, 0, True)),
        Candidate("SDPA, no prior", partial(_bare, config, shape, 0, False)),
        Candidate("eotattn, no prior", partial(_cached, config, shape, 0, None)),
        Candidate("eotattn, recency + sink, reserved", partial(_cached, config, shape, -lanes, prior)),
        Candidate("eotattn, recency + sink, appended", partial(_cached, config, shape, 0, prior)),
        Candidate(f"SDPA alone, {wide - width} columns more", partial(_bare, config, shape, wide - width, False)),
    ]
    with torch.inference_mode():
        found = measured(candidates, config)
    names = ("batch", "heads", "kv_heads", "length", "width")
    return [{**dict(zip(names, shape, strict=True)), "pass": "decode", **row} for row in found]


def _sides(config: Configuration, shape: Shape, more: int) -> tuple[Tensor, Tensor, Tensor]:
    """One query and all keys and values; ``more`` columns of queries and keys."""
    batch, heads, kv_heads, length, width = shape
    generator = torch.Generator(config.device).manual_seed(config.seed)  # on the device: these are large
    shapes = ((heads, 1, width + more), (kv_heads, length, width + more), (kv_heads, length, width))
    query, key, value = (torch.randn(batch, *one, generator=generator, **config.place) for one in shapes)
    return query, key, value


def _bare(config: Configuration, shape: Shape, more: int, appending: bool) -> Callable[[], Any]:
    query, key, value = _sides(config, shape, more)
    attend = partial(functional.scaled_dot_product_attention, query, key, value, enable_gqa=True)
    if not appending:
        return attend
    last = key[:, :, -1:].clone(), value[:, :, -1:].clone()

    def step() -> Tensor:
        key[:, :, -1:], value[:, :, -1:] = last
        return attend()

    return step


def _cached(config: Configuration, shape: Shape, more: int, prior: LogPrior | None) -> Callable[[], Any]:
    batch, _, kv_heads, length, width = shape
    query, key, value = _sides(config, shape, more)
    cache = KeyValueCache(batch, kv_heads, length, width + more, width, prior=prior, **config.place)
    cache.append(key[:, :, :-1], value[:, :, :-1])
    last = key[:, :, -1:].clone(), value[:, :, -1:].clone()

    def step() -> Tensor | tuple[Tensor, ...]:
        cache.crop(length - 1)
        return prior_attention(query, *last, prior=prior, cache=cache, is_causal=True, backend="sdpa")

    return step
