"""How exact the gradients of slopes and of forgetting gates are, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eotattn.attention import prior_attention
from eotattn.benchmarks.oracle import gate_gradient, relative_error, slope_gradient
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import content, measured, output_of
from eotattn.benchmarks.timing import Candidate, Row
from eotattn.priors import ForgettingPrior, RecencyPrior, running_sums

__all__ = ["gate_errors", "gradients", "slope_errors"]


def gradients(config: Configuration) -> Iterator[Row]:
    """Gradients of slopes and gates against float64: the norm of the error over that of the signal, over heads.

    ``of_strengths`` is the same for the parameter, in which a head counts by its ALiBi slope; ``worst_head`` is the
    largest error of a head over the root mean square of all heads' signals. Of gates, the norms are over tokens, and
    ``value`` is that of all heads together.
    """
    for length in config.pick([128], [2048, 8192, 32768]):
        yield from slope_errors(config, length)
        for backend in ("sdpa", "rebased"):
            yield from slope_errors(config, length, has_sink=True, backend=backend)
        yield from gate_errors(config, length)
    for shape in config.pick([(1, 2, 64)], [(8, 12, 2048), (1, 12, 32768)]):
        yield from sum_times(config, shape)


def slope_errors(
    config: Configuration,
    length: int,
    heads: int = 12,
    offsets: tuple[int, ...] = (0,),
    *,
    has_sink: bool = False,
    backend: str = "sdpa",
) -> list[Row]:
    """Errors at one length, with the first token at each of ``offsets``; the gradient itself does not depend on it.

    With a sink of logit zero where ``has_sink``.
    """
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
        sink = 0.0 if has_sink else -math.inf
        exact = slope_gradient(q, k, v, up, prior.slopes.detach(), 1 / math.sqrt(width), sink=sink)
        for first in offsets:
            positions = range(first, first + length)
            options: dict[str, Any] = {"backend": backend}
            options["sinks"] = torch.zeros(heads, device=query.device) if has_sink else None
            found = _gradient(prior, [query, key, value], up, positions, **options).double() / units
            error = (found - exact).abs() / exact.square().mean().sqrt()  # of the slope: every head counts alike
            name = f"slopes {slope}{', beside a sink, ' + backend if has_sink else ''}"
            row: Row = {"quantity": "slope gradient", "length": length, "first": first, "name": name}
            row["dtype"] = config.dtype
            row["value"], row["worst_head"] = relative_error(found, exact), float(error.max())
            row["of_strengths"] = relative_error(found * units, exact * units)
            rows.append(row)
    return rows


def gate_errors(config: Configuration, length: int, heads: int = 12, *, is_cured: bool = True) -> list[Row]:
    """Errors at one length, heads with half-lives from 2 to 65 536 tokens and gates that vary from token to token.

    Without ``is_cured`` the bias of keys is given alone, and what rounding leaves of the rows' sums is in its gradient.
    """
    width = 64
    sides = [content(replace(config, seed=config.seed + n), 1, heads, length, width) for n in range(4)]
    query, key, value, upstream = sides
    mean = torch.tensor(ForgettingPrior(1, heads).half_lives, dtype=torch.float64).reciprocal() * math.log(2)
    steps = torch.rand(heads, length, generator=torch.Generator().manual_seed(config.seed), dtype=torch.float64)
    log_gates = (-2 * mean[:, None] * steps).to(query.device).requires_grad_()
    sums = running_sums(log_gates[None])
    of_queries = sums if is_cured else None
    output = prior_attention(query, key, value, is_causal=True, backend="sdpa", key_bias=-sums, query_bias=of_queries)
    found = torch.autograd.grad(output_of(output), [log_gates], upstream)[0]
    with torch.no_grad():
        exact = gate_gradient(query, key, value, upstream, log_gates, 1 / math.sqrt(width))
    errors = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    row: Row = {"quantity": "gate gradient", "length": length, "name": "gates" if is_cured else "gates, bias alone"}
    row |= {"dtype": config.dtype, "value": float((found - exact).norm() / exact.norm())}
    return [{**row, "mean_head": float(errors.mean()), "worst_head": float(errors.max())}]


def sum_times(config: Configuration, shape: tuple[int, ...]) -> list[Row]:
    """Time of the running sums of gates (B, H, L), forward and backward, beside sums in float32."""
    log_gates = -content(replace(config, dtype="float32"), *shape).detach().abs()
    log_gates.requires_grad_()

    def make(sums: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        upstream = torch.ones_like(sums(log_gates))
        return lambda: torch.autograd.grad(sums(log_gates), log_gates, upstream)

    named = {"running sums in float32": lambda x: x.cumsum(-1), "running sums of gates": running_sums}
    found = measured([Candidate(name, partial(make, sums)) for name, sums in named.items()], config)
    return [{"quantity": "running sums", "length": shape[-1], **row} for row in found]


def _gradient(prior: RecencyPrior, sides: list[Tensor], upstream: Tensor, positions: range, **options: Any) -> Tensor:
    """(H,) gradient of the strengths through one causal call."""
    options |= {"query_positions": positions, "key_positions": positions, "prior": prior, "is_causal": True}
    query, key, value = sides
    output = output_of(prior_attention(query, key, value, **options))
    return torch.autograd.grad(output, [prior.strength], upstream)[0]
