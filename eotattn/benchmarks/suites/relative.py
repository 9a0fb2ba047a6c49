"""Relative priors that are constant far away: near and far keys apart, against bare attention and a dense bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention import prior_attention
from eotattn.benchmarks.oracle import relative_error
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import content, measured, output_of, trained
from eotattn.benchmarks.timing import Candidate, Row
from eotattn.priors import LogPrior, RelativeBiasPrior, T5Prior

__all__ = ["relative"]

Attend = Callable[..., Tensor]

#: Rows of the error.
ROWS = 64


def relative(config: Configuration) -> Iterator[Row]:
    """T5's buckets and a clipped table in both directions: forward, and forward and backward with the table's gradient.

    The bounds at 32 768 tokens and 128 near ones on a GPU: at most 1.6 times the bare call's time, and a fifth of the
    dense bias's.
    """
    for shape in config.pick([(1, 2, 512, 32)], [(1, 8, 8192, 64), (1, 8, 32_768, 64)]):
        yield from _of_shape(config, *shape)


def _of_shape(config: Configuration, batch: int, heads: int, length: int, width: int) -> Iterator[Row]:
    near = min(128, length // 4)
    sides = [content(config, batch, heads, length, width) for _ in range(3)]
    for is_causal in (True, False):
        priors = {
            "T5": T5Prior(heads, 32, near, bidirectional=not is_causal),
            "clipped": RelativeBiasPrior(heads, near),
        }
        for name, prior in priors.items():
            trained(prior, config)
            for learns in (False, True):
                named: dict[str, Attend] = {
                    "SDPA, no bias": _bare,
                    "eotattn, near and far": _near_far,
                    "SDPA, dense bias": _dense,
                }
                candidates = []
                for label, route in named.items():
                    attend = partial(route, prior, is_causal)
                    learned = () if route is _bare else tuple(prior.parameters())
                    make = partial(_timed, attend, sides, learned, learns)
                    error = None if learns or route is _bare else partial(_error, attend, sides, prior, is_causal)
                    candidates.append(Candidate(label, make, error))
                size = {"batch": batch, "heads": heads, "length": length, "width": width, "prior": name}
                size |= {"causal": is_causal, "pass": "forward+backward" if learns else "forward"}
                yield from ({**size, **row} for row in measured(candidates, config))


def _bare(prior: LogPrior, is_causal: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def _near_far(prior: LogPrior, is_causal: bool, *sides: Tensor) -> Tensor:
    return output_of(prior_attention(*sides, prior=prior, is_causal=is_causal, backend="near_far"))


def _dense(prior: LogPrior, is_causal: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What users do today: the table looked up for every pair, in the dtype of the content."""
    at = torch.arange(query.shape[2], device=query.device)
    lag = at[:, None] - at
    head = torch.arange(prior.num_heads, device=at.device)[:, None]
    of_lags = prior.log_prior(head, torch.arange(len(at) * 2 - 1, device=at.device).float(), at[-1].float())
    bias = of_lags.to(query.dtype)[:, lag + len(at) - 1]
    if is_causal:
        bias = bias.masked_fill(lag < 0, float("-inf"))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.unsqueeze(0))


def _timed(attend: Attend, sides: Sequence[Tensor], learned: Sequence[Tensor], learns: bool) -> Callable[[], Any]:
    if learns:
        upstream = torch.ones_like(sides[2])
        return lambda: torch.autograd.grad(attend(*sides), [*sides, *learned], upstream)
    return torch.no_grad()(partial(attend, *sides))


def _error(attend: Attend, sides: Sequence[Tensor], prior: LogPrior, is_causal: bool) -> float:
    """Of the last rows of the first sample against float64."""
    query, key, value = (side[0].detach().double() for side in sides)
    keys = torch.arange(query.shape[1], device=query.device)
    rows = keys[-ROWS:]
    score = query[:, rows] @ key.mT / math.sqrt(query.shape[-1])
    score = score + prior.dense(rows, keys, dtype=torch.float64).detach()
    if is_causal:
        score = score.masked_fill(rows[:, None] < keys, float("-inf"))
    with torch.no_grad():
        return relative_error(attend(*sides)[0, :, -ROWS:], score.softmax(-1) @ value)
