"""Causal calls with sinks, and with the log-sum-exp that they need, against the same calls without.

Legend: B batch, H heads, Hk key heads, L tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention import AttentionSinks, prior_attention
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import content, gpt_prior, measured, output_of, trained
from eotattn.benchmarks.timing import Candidate, Row

__all__ = ["sinks"]


def sinks(config: Configuration) -> Iterator[Row]:
    """Attention with sinks, forward and both ways, on the whole triangle and in a window."""
    for shape in config.pick([(1, 4, 2, 256, 32)], [(2, 16, 16, 8192, 64), (2, 32, 8, 8192, 64)]):
        size = dict(zip(("batch", "heads", "kv_heads", "length", "width"), shape, strict=True))
        for window in (None, 128):
            for direction in ("forward", "forward+backward"):
                candidates = list(_candidates(config, shape, window, trains=direction != "forward"))
                yield from (
                    {**size, "window": window, "pass": direction, **row} for row in measured(candidates, config)
                )


def _candidates(
    config: Configuration, shape: tuple[int, ...], window: int | None, *, trains: bool
) -> Iterator[Candidate]:
    batch, heads, kv_heads, length, width = shape
    sides = [content(config, batch, count, length, width) for count in (heads, kv_heads, kv_heads)]
    prior, place = trained(gpt_prior(heads), config), {"device": config.place["device"]}
    kinds: dict[str, dict[str, Any]] = {
        "no sink": {},
        "the log-sum-exp alone": {"return_lse": True},
        "a logit a head": {"sinks": AttentionSinks.logit(heads, **place)},
        "a zero key": {"sinks": AttentionSinks.zero_key()},
        "4 registers": {"sinks": AttentionSinks.registers(kv_heads, width, 4, **place)},
    }
    if window is None:
        plain = partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=heads != kv_heads)
        yield Candidate("SDPA", partial(_timed, plain, sides, [], trains))
        kinds["a logit a head, from close by"] = {**kinds["a logit a head"], "backend": "rebased"}
    for of_prior in (None, prior):
        for kind, options in kinds.items():
            called = {"prior": of_prior, "is_causal": True, "window": window, **options}
            learned = [p for part in called.values() if isinstance(part, torch.nn.Module) for p in part.parameters()]
            name = f"eotattn, {'no prior' if of_prior is None else 'recency + sink prior'}, {kind}"
            yield Candidate(name, partial(_timed, partial(prior_attention, **called), sides, learned, trains))


def _timed(
    attend: Callable[..., Any], sides: list[Tensor], learned: Sequence[Tensor], trains: bool
) -> Callable[[], Any]:
    upstream = torch.randn_like(sides[0]) if trains else None

    def step() -> Any:
        if upstream is None:
            with torch.no_grad():
                return attend(*sides)
        return torch.autograd.grad(output_of(attend(*sides)), [*sides, *learned], upstream)

    return step
