"""How exact the gradients of slopes are in low precision, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from eotattn.attention import prior_attention
from eotattn.benchmarks.oracle import relative_error, slope_gradient
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import content, output_of
from eotattn.benchmarks.timing import Row
from eotattn.priors import RecencyPrior

__all__ = ["gradients"]


def gradients(config: Configuration) -> Iterator[Row]:
    """Slope gradients against float64: the norm of the error over that of the signal, over heads.

    ``of_strengths`` is the same for the parameter, in which a head counts by its ALiBi slope; ``worst_head`` is the
    largest error of a head over the root mean square of all heads' signals.
    """
    heads, width = 12, 64
    for length in config.pick([128], [2048, 8192, 32768]):
        query, key, value, upstream = (
            content(replace(config, seed=config.seed + n), 1, heads, length, width) for n in range(4)
        )
        for slope in ("ALiBi", "0.5"):
            prior = RecencyPrior(heads).to(query.device)
            if slope != "ALiBi":
                with torch.no_grad():
                    prior.strength.copy_(0.5 / prior.unit_slopes)
            output = output_of(prior_attention(query, key, value, prior=prior, is_causal=True, backend="sdpa"))
            (found,) = torch.autograd.grad(output, [prior.strength], upstream.detach())
            slopes = prior.slopes.detach()
            q, k, v, up = (tensor.detach() for tensor in (query, key, value, upstream))
            exact = slope_gradient(q, k, v, up, slopes, 1 / math.sqrt(width))
            found = found.double() / prior.unit_slopes  # of the slope, not of the strength: every head counts alike
            error = (found - exact).abs() / exact.square().mean().sqrt()
            row: Row = {"quantity": "slope gradient", "length": length, "name": f"slopes {slope}"}
            row["value"], row["worst_head"] = relative_error(found, exact), float(error.max())
            row["of_strengths"] = relative_error(found * prior.unit_slopes, exact * prior.unit_slopes)
            yield row
