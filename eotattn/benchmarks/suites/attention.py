"""One fused call with a prior against other ways to have one.

Legend: B batch, H heads, L tokens, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention import prior_attention
from eotattn.benchmarks import peers
from eotattn.benchmarks.oracle import causal_rows, relative_error
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import content, gpt_prior, measured, output_of, trained
from eotattn.benchmarks.timing import Candidate, Row
from eotattn.kernels.sdpa import WIDTH_STEP, kernel_width
from eotattn.priors import LogPrior, RecencyPrior, goat_prior

__all__ = ["attention"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(config: Configuration) -> Iterator[Row]:
    """The fused call with a prior against other ways to have one: forward, and forward and backward.

    Errors are those of the last 64 rows, each against its own problem in float64.
    """
    for shape in config.pick([(1, 2, 64, 32)], [(2, 16, 8192, 64), (2, 8, 8192, 128)]):
        size = dict(zip(("batch", "heads", "length", "width"), shape, strict=True))
        for direction in ("forward", "forward+backward"):
            torch.compiler.reset()  # every score modification is a program of its own, and their number is limited
            subject = _Subject(config=config, direction=direction, **size)
            yield from ({**size, "pass": direction, **row} for row in measured(list(_candidates(subject)), config))


@dataclass(frozen=True)
class _Subject:
    """One size and direction: the content, and how a way to attend becomes a candidate."""

    config: Configuration
    batch: int
    heads: int
    length: int
    width: int
    direction: str

    @cached_property
    def inputs(self) -> list[Tensor]:
        return [content(self.config, self.batch, self.heads, self.length, self.width) for _ in range(3)]

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.width)

    def widened(self, more: int) -> list[Tensor]:
        """Content whose queries and keys have so many columns of zeros after, or columns fewer of, their own."""
        query, key, value = self.inputs
        return [*(functional.pad(one.detach(), (0, more)).requires_grad_() for one in (query, key)), value]

    def joined(self, prior: LogPrior) -> list[Tensor]:
        """Content narrowed by the prior's lanes, with these beside it: what the kernel alone is given."""
        positions = torch.arange(self.length, device=self.inputs[0].device)
        narrow = self.width - prior.num_lanes(self.inputs[0].dtype)
        with torch.no_grad():
            lanes = prior.lanes(positions, positions, dtype=self.inputs[0].dtype, query_scale=math.sqrt(self.width))
            sides = [
                torch.cat([one[..., :narrow], lane.expand(*one.shape[:-1], -1)], dim=-1).requires_grad_()
                for one, lane in zip(self.inputs, (lanes.query, lanes.key), strict=False)
            ]
        return [*sides, self.inputs[2]]

    def candidate(
        self,
        name: str,
        make: Callable[[], Attend],
        *,
        prior: LogPrior | None = None,
        inputs: Sequence[Tensor] | None = None,
        learned: Sequence[Tensor] = (),
        exact: Callable[[Sequence[Tensor], Tensor], Tensor] | None = None,
    ) -> Candidate:
        """A way to attend with ``prior``, whose parameters, or ``learned``, want gradients too."""
        given = self.inputs if inputs is None else inputs
        made, parameters = cache(make), learned if prior is None else list(prior.parameters())
        expected = partial(self._expected, prior) if exact is None else exact

        def prepare() -> Callable[[], Any]:
            attend = made()
            if self.direction == "forward":
                return partial(_without_gradient, attend, given)
            upstream = torch.randn_like(given[2])
            return lambda: torch.autograd.grad(attend(*given), [*given, *parameters], upstream)

        def error() -> float:
            rows = torch.arange(self.length - min(64, self.length), self.length, device=given[0].device)
            return relative_error(_without_gradient(made(), given)[0, :, rows], expected(given, rows))

        return Candidate(name, prepare, error if self.direction == "forward" else None)

    def _expected(self, prior: LogPrior | None, inputs: Sequence[Tensor], rows: Tensor) -> Tensor:
        query, key, value = (one.detach() for one in inputs)
        scale = 1 / math.sqrt(min(self.width, query.shape[-1]))
        return causal_rows(query, key, value, rows, prior, scale)


def _candidates(subject: _Subject) -> Iterator[Candidate]:
    yield subject.candidate("SDPA, no prior", lambda: _plain)
    yield from _lane_candidates(subject)
    for kind in ("eager", "fused"):
        if kind == "eager" or subject.config.device != "cpu":
            rotary = partial(peers.Rotated, subject.width, kind=kind)
            yield subject.candidate(
                f"RoPE, {kind}", partial(_rotated, rotary), exact=partial(_rotated_exactly, subject)
            )
    if subject.config.device != "cpu":
        yield from _flex_candidates(subject)
    yield _dense_candidate(subject)


def _lane_candidates(subject: _Subject) -> Iterator[Candidate]:
    """Our forms, the kernel alone at their widths, and FlashBias' form."""
    dtype = subject.inputs[0].dtype
    paper = goat_prior(subject.heads, num_frequencies=4)
    for name, prior in (("recency + sink", gpt_prior(subject.heads)), ("GOAT, 4 frequencies", paper)):
        trained(prior, subject.config)
        lanes, ours = -(-prior.num_lanes(dtype) // WIDTH_STEP) * WIDTH_STEP, partial(partial, _fused, prior)
        if lanes < subject.width:
            narrow = subject.widened(-lanes)
            yield subject.candidate(f"eotattn, {name}, reserved", ours, prior=prior, inputs=narrow)
            alone = partial(partial, _plain, scale=subject.scale)
            within = f"SDPA alone, {name} within its columns"
            yield subject.candidate(within, alone, inputs=subject.joined(prior))
        yield subject.candidate(f"eotattn, {name}, appended", ours, prior=prior)
    wide = kernel_width(subject.width + lanes, subject.inputs[0].device) - subject.width
    plain = partial(partial, _plain, scale=subject.scale)
    yield subject.candidate(f"SDPA alone, {wide} columns more", plain, inputs=subject.widened(wide))
    yield subject.candidate("FlashBias as SDPA, GOAT, 4 frequencies", partial(partial, _flashbias, paper), prior=paper)


def _flex_candidates(subject: _Subject) -> Iterator[Candidate]:
    device = subject.inputs[0].device
    flex = partial(peers.flex, length=subject.length, device=device)
    yield subject.candidate("FlexAttention, causal", partial(flex, None))
    bias = torch.zeros(subject.length, device=device, requires_grad=True)
    yield subject.candidate("FlexAttention, learnable key bias", partial(flex, peers.KeyBias(bias)), learned=[bias])
    recency = trained(RecencyPrior(subject.heads), subject.config)
    yield subject.candidate("FlexAttention, learnable slopes", partial(flex, recency), prior=recency)


def _dense_candidate(subject: _Subject) -> Candidate:
    shape = (subject.length, subject.length)
    future = torch.ones(shape, dtype=torch.bool, device=subject.inputs[0].device).triu(1)
    dense = torch.zeros(subject.heads, *shape, **subject.config.place).masked_fill_(future, float("-inf"))
    dense.requires_grad_(subject.direction != "forward")
    return subject.candidate("dense learnable bias", lambda: partial(_with_bias, dense), learned=[dense])


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def _fused(prior: LogPrior, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return output_of(prior_attention(query, key, value, prior=prior, is_causal=True, backend="sdpa"))


def _flashbias(prior: LogPrior, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return peers.flashbias(query, key, value, prior)


def _with_bias(bias: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return peers.dense_bias(query, key, value, bias)


def _rotated(make: Callable[[], peers.Rotated]) -> Attend:
    rotary = make()
    return lambda query, key, value: _plain(*rotary(query, key), value)


def _rotated_exactly(subject: _Subject, inputs: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Attention over content turned in float64."""
    query, key, value = (one.detach().double() for one in inputs)
    turned = peers.Rotated(subject.width, kind="eager")(query, key)
    return causal_rows(*turned, value, rows, None, subject.scale)


def _without_gradient(attend: Attend, inputs: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return attend(*inputs)
