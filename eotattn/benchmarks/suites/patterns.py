"""Causal windows and packed documents: by kernels that skip what is not seen, and by those that do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention import PackedDocuments, prior_attention
from eotattn.benchmarks.oracle import relative_error
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import content, gpt_prior, measured, output_of, trained
from eotattn.benchmarks.timing import Candidate, Row
from eotattn.priors import LogPrior

__all__ = ["patterns"]


def patterns(config: Configuration) -> Iterator[Row]:
    """Windows and documents against the whole causal triangle: forward, and forward and backward."""
    batch, heads, length, width = config.pick([(1, 2, 256, 32)], [(2, 16, 8192, 64)])[0]
    small = length // 32
    lengths = [small, 3 * small, small, 11 * small, length - 16 * small] * batch
    asked: dict[str, dict[str, Any]] = {
        "window": {"window": small},
        "documents": {"documents": PackedDocuments(lengths)},
    }
    backends = ("sdpa",) if config.device == "cpu" else ("varlen", "sdpa")
    sides = [content(config, batch, heads, length, width) for _ in range(3)]
    for pattern, arguments in asked.items():
        for learns in (False, True):
            candidates = [Candidate("SDPA, whole triangle", partial(_timed, _whole, sides, (), learns))]
            for name, prior in (("no prior", None), ("recency + sink", trained(gpt_prior(heads), config))):
                compiles = config.device != "cpu" and prior is None and pattern == "documents"  # takes seconds
                for backend in (*backends, "flex") if compiles else backends:
                    attend = partial(_attend, prior, backend, arguments)
                    learned = () if prior is None else tuple(prior.parameters())
                    error = None if learns else partial(_error, attend, sides, prior, arguments)
                    make = partial(_timed, attend, sides, learned, learns)
                    candidates.append(Candidate(f"eotattn, {name}, {backend}", make, error))
            size = {"batch": batch, "heads": heads, "length": length, "width": width, "pattern": pattern}
            found = measured(candidates, config)
            yield from ({**size, "pass": "forward+backward" if learns else "forward", **row} for row in found)


Attend = Callable[..., Tensor]


def _whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def _attend(prior: LogPrior | None, backend: str, arguments: dict[str, Any], *sides: Tensor) -> Tensor:
    return output_of(prior_attention(*sides, prior=prior, is_causal=True, backend=backend, **arguments))


def _timed(attend: Attend, sides: Sequence[Tensor], learned: Sequence[Tensor], learns: bool) -> Callable[[], Any]:
    upstream = torch.ones_like(sides[2])
    if learns:
        return lambda: torch.autograd.grad(attend(*sides), [*sides, *learned], upstream)
    return lambda: _without_gradient(attend, sides)


def _without_gradient(attend: Attend, sides: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return attend(*sides)


def _error(attend: Attend, sides: Sequence[Tensor], prior: LogPrior | None, arguments: dict[str, Any]) -> float:
    """Of the last 64 rows of the first sample against float64: no row sees more than its document or window."""
    length, scale = sides[0].shape[2], 1 / math.sqrt(sides[0].shape[3])
    documents, window = arguments.get("documents"), arguments.get("window", length)
    start = 0 if documents is None else length - documents.lengths[-1]
    query, key, value = (side[0, :, start:].detach().double() for side in sides)
    rows = torch.arange(query.shape[1] - 64, query.shape[1], device=query.device)
    keys = torch.arange(query.shape[1], device=query.device)
    score = scale * query[:, rows] @ key.mT
    if prior is not None:
        score = score + prior.dense(rows, keys, dtype=torch.float64).detach()
    lag = rows[:, None] - keys
    expected = score.masked_fill((lag < 0) | (lag >= window), float("-inf")).softmax(-1) @ value
    return relative_error(_without_gradient(attend, sides)[0, :, -64:], expected)
