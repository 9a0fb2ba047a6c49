"""One new token against a cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from eotattn.attention import prior_attention
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import content, gpt_prior, measured, trained
from eotattn.benchmarks.timing import Candidate, Row

__all__ = ["decode"]


def decode(config: Configuration) -> list[Row]:
    """One new token against a cache, grouped queries: the attention of a decoding step."""
    rows: list[Row] = []
    for batch, heads, kv_heads, length, width in config.pick(
        [(1, 4, 2, 64, 16)], [(8, 32, 8, 2048, 128), (8, 32, 8, 32768, 128)]
    ):
        query = content(config, batch, heads, 1, width).detach()
        key, value = (content(config, batch, kv_heads, length, width).detach() for _ in range(2))
        prior = trained(gpt_prior(heads), config)
        at: dict[str, Any] = {"query_positions": range(length - 1, length), "key_positions": range(length)}

        inputs = (query, key, value)
        bare = partial(functional.scaled_dot_product_attention, *inputs, enable_gqa=True)
        door = partial(prior_attention, *inputs, is_causal=True, backend="sdpa", **at)
        candidates = [
            Candidate("SDPA, no prior", partial(_given, bare)),
            Candidate("eotattn, no prior", partial(_given, door)),
            Candidate("eotattn, recency + sink, appended", partial(_given, partial(door, prior=prior))),
        ]
        with torch.inference_mode():
            found = measured(candidates, config)
        size = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "length": length, "width": width}
        rows += [{**size, "pass": "decode", **row} for row in found]
    return rows


def _given(run: Callable[[], Any]) -> Callable[[], Any]:
    return run
