"""How exact the gradients of slopes are, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eotattn.attention import prior_attention
from eotattn.benchmarks.oracle import relative_error, slope_gradient
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import content, output_of
from eotattn.benchmarks.timing import Row
from eotattn.priors import RecencyPrior

__all__ = ["gradients", "slope_errors"]


def gradients(config: Configuration) -> Iterator[Row]:
    """Slope gradients against float64: the norm of the error over that of the signal, over heads.

    ``of_strengths`` is the same for the parameter, in which a head counts by its ALiBi slope; ``worst_head`` is the
    largest error of a head over the root mean square of all heads' signals.
    """
    for length in config.pick([128], [2048, 8192, 32768]):
        yield from slope_errors(config, length)


def slope_errors(config: Configuration, length: int, heads: int = 12, offsets: tuple[int, ...] = (0,)) -> list[Row]:
    """Errors at one length, with the first token at each of ``offsets``; the gradient itself does not depend on it."""
    rows: list[Row] = []
    width = 64
    query, key, value, upstream = (
        content(replace(config, seed=config.seed + n), 1, heads, length, width) for n in range(4)
    )
    for slope in ("ALiBi", "0.5"):
        prior = RecencyPrior(heads).to(query.device)
        units = torch.tensor(prior.unit_slopes, dtype=torch.float64, device=query.device)
        if slope != "ALiBi":
            with torch.no_grad():
                prior.strength.copy_(0.5 / units)
        q, k, v, up = (tensor.detach() for tensor in (query, key, value, upstream))
        exact = slope_gradient(q, k, v, up, prior.slopes.detach(), 1 / math.sqrt(width))
        for first in offsets:
            positions = range(first, first + length)
            found = _gradient(prior, [query, key, value], up, positions).double() / units
            error = (found - exact).abs() / exact.square().mean().sqrt()  # of the slope: every head counts alike
            row: Row = {"quantity": "slope gradient", "length": length, "first": first, "name": f"slopes {slope}"}
            row["dtype"] = config.dtype
            row["value"], row["worst_head"] = relative_error(found, exact), float(error.max())
            row["of_strengths"] = relative_error(found * units, exact * units)
            rows.append(row)
    return rows


def _gradient(prior: RecencyPrior, sides: list[Tensor], upstream: Tensor, positions: range) -> Tensor:
    """(H,) gradient of the strengths through one causal call."""
    at: dict[str, Any] = {"query_positions": positions, "key_positions": positions}
    output = output_of(prior_attention(*sides, prior=prior, is_causal=True, backend="sdpa", **at))
    return torch.autograd.grad(output, [prior.strength], upstream)[0]
