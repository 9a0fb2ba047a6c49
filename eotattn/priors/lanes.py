"""Lanes: a log-prior as an inner product, also in the number formats of fused kernels.

Legend: B batch, H heads, Q queries, K keys, F factors, P lanes.

A prior states its factorisation once, in float32 or float64, as :class:`LaneFactors`. This file turns it into
:class:`Lanes` of the kernel's dtype. A 16-bit number keeps few digits, so a factor is written as a sum of several
numbers of that dtype and the products that matter are kept; sums then happen in the kernel's fp32 accumulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eotattn.checks import require

__all__ = ["LaneFactors", "Lanes", "computing_dtype", "position_digits"]

DIGIT_BASE = 256
#: What the digits of a position are multiplied by: one weight a digit, for positions up to 256 ** 3 - 1 = 16 777 215.
#: Powers of 256 are shared between digits and weights, so that neither overflows float16.
DIGIT_WEIGHTS = (1.0, 1.0, 256.0)


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a prior computes for a kernel of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_low_precision(dtype: torch.dtype) -> bool:
    """Whether factors must be split to be carried by ``dtype`` (bfloat16 and float16)."""
    return torch.finfo(dtype).bits < 32


def default_terms(dtype: torch.dtype, *, one_side_is_exact: bool) -> int:
    """Numbers of ``dtype`` that a factor is split into, where the caller does not choose."""
    if not is_low_precision(dtype):
        return 1
    return 3 if one_side_is_exact and dtype == torch.bfloat16 else 2


@dataclass(frozen=True)
class LaneFactors:
    """Part of a log-prior in factored form: log_prior_ij = <query_i, key_j> + row_i.

    Args:
        query: (..., H, Q, F), nats; the learnable side of most priors.
        key: (..., 1 or H, K, F), dimensionless; one head where all heads share it.
        row: (..., H, Q), nats, or ``None`` for zero. Softmax does not see it; sums over masked grids do.
        exact: The side whose entries any kernel dtype represents exactly (digits, indicators), if one does, or both.
    """

    query: Tensor
    key: Tensor
    row: Tensor | None = None
    exact: Literal["query", "key", "both"] | None = None

    def default_terms(self, dtype: torch.dtype) -> int:
        """Numbers of ``dtype`` that a factor is split into, where the caller does not choose."""
        return 1 if self.exact == "both" else default_terms(dtype, one_side_is_exact=self.exact is not None)

    def num_lanes(self, dtype: torch.dtype, terms: int | None = None) -> int:
        """Lanes that these factors occupy in ``dtype``."""
        terms = self._terms(dtype, terms)
        return self.query.shape[-1] * (terms if self.exact else terms * (terms + 1) // 2)

    def split(self, dtype: torch.dtype, terms: int | None = None, *, query_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Write the factors in ``dtype``: (..., H, Q, P) and (..., 1 or H, K, P).

        ``query_scale`` multiplies the query side before rounding, or the key side where the query is exact. Gradients
        flow through the leading terms alone; those carry the whole derivative, since the corrections are differences
        that cancel.
        """
        terms = self._terms(dtype, terms)
        on_key = self.exact == "query"  # a scaled indicator would no longer be exact
        query, key = (self.query, self.key * query_scale) if on_key else (self.query * query_scale, self.key)
        query_terms = _split(query, dtype, 1 if self.exact == "query" else terms)
        key_terms = _split(key, dtype, 1 if self.exact == "key" else terms)
        kept = [(a, b) for a in range(len(query_terms)) for b in range(len(key_terms)) if a + b < terms]
        return torch.cat([query_terms[a] for a, _ in kept], dim=-1), torch.cat([key_terms[b] for _, b in kept], dim=-1)

    def error_bound(self, dtype: torch.dtype, terms: int | None = None) -> Tensor:
        """Largest error of the split inner product, in nats, 0-d: truncation, underflow and accumulation.

        With unit roundoff r of ``dtype`` and n terms a side, the truncation is below (n + 2) r^n |query| |key|, the
        accumulation in fp32 (fp64 for float64) below P r' |query| |key| with its own unit roundoff r'.
        """
        terms = self._terms(dtype, terms)
        info, accumulator = torch.finfo(dtype), torch.finfo(computing_dtype(dtype))
        with torch.no_grad():
            query = self.query.abs().flatten(0, -2).amax(0).double()
            key = self.key.abs().flatten(0, -2).amax(0).double()
        truncation = (terms + 2) * (info.eps / 2) ** terms
        accumulation = (self.num_lanes(dtype, terms) + 2) * accumulator.eps / 2
        underflow = info.smallest_normal * info.eps * terms
        return ((truncation + accumulation) * query * key + underflow * (query + key)).sum()

    def _terms(self, dtype: torch.dtype, asked: int | None) -> int:
        return asked if asked and self.exact != "both" else self.default_terms(dtype)


def _split(factor: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Write ``factor`` as a sum of ``count`` tensors of ``dtype``, largest first."""
    parts = [factor.to(dtype)]
    remainder = factor.detach()
    for _ in range(count - 1):
        remainder = remainder - parts[-1].detach().to(remainder.dtype)
        parts.append(remainder.to(dtype))
    return parts


def position_digits(positions: Tensor) -> Tensor:
    """Write integer positions in base 256 so that a 16-bit dtype holds each digit exactly.

    Args:
        positions: (...) whole numbers, tokens. From 16 777 216 on the last digit is larger than the base and is rounded
            by the dtype; nothing wraps.

    Returns:
        (..., 3) float64, with position = sum(digits * DIGIT_WEIGHTS). Negative positions have negative digits.

    Raises:
        TypeError: If the positions have a floating dtype, whose fractions the digits would drop.

    Example:
        >>> position_digits(torch.tensor([70000])).tolist()
        [[112.0, 4352.0, 256.0]]
    """
    rule = "have an integer dtype in a 16-bit kernel"
    whole = not positions.is_floating_point()
    require(whole, "position_digits", "positions", rule, positions, "Round them or use float32", error=TypeError)
    size, sign = positions.to(torch.int64).abs(), positions.sign()
    low, middle = size & (DIGIT_BASE - 1), size & (DIGIT_BASE - 1) * DIGIT_BASE
    high = (size >> 16) * DIGIT_BASE
    return (torch.stack([low, middle, high], dim=-1) * sign.unsqueeze(-1)).double()


@dataclass(frozen=True)
class Lanes:
    """Query and key lanes of one log-prior, in the dtype of a kernel.

    <query_hi, key_hj> equals log_prior_hij up to a constant of each row (h, i), within ``error_bound`` and the rounding
    of phases in float64, which is about 1e-10 radians at a position of a million.

    Args:
        query: (..., H, Q, P).
        key: (..., 1 or H, K, P).
        num_shared: The first lanes of ``key`` that are the same for all heads.
        factors: What the lanes were made from, for the bound.
        terms: Splits asked for, ``None`` for the defaults.
    """

    query: Tensor
    key: Tensor
    num_shared: int
    factors: tuple[LaneFactors, ...] = ()
    terms: int | None = None

    @classmethod
    def from_factors(
        cls, factors: Sequence[LaneFactors], *, dtype: torch.dtype, terms: int | None = None, query_scale: float = 1.0
    ) -> Lanes:
        """Split every factor and put the lanes side by side, those that all heads share first."""
        ordered = tuple(sorted(factors, key=lambda part: part.key.shape[-3] != 1))
        pairs = [part.split(dtype, terms, query_scale=query_scale) for part in ordered]
        num_shared = sum(key.shape[-1] for _, key in pairs if key.shape[-3] == 1)
        query = _concatenate([query for query, _ in pairs])
        key = _concatenate([key for _, key in pairs])
        return cls(query, key, num_shared, ordered, terms)

    @property
    def num_lanes(self) -> int:
        """Prior width P."""
        return self.query.shape[-1]

    @property
    def error_bound(self) -> float:
        """Largest error of the inner product, in nats (a stated bound; :meth:`LaneFactors.error_bound`)."""
        return float(sum(part.error_bound(self.query.dtype, self.terms) for part in self.factors))

    def dense(self) -> Tensor:
        """The inner product, (..., H, Q, K), accumulated in fp32 or better as kernels do."""
        dtype = computing_dtype(self.query.dtype)
        return self.query.to(dtype) @ self.key.to(dtype).transpose(-1, -2)

    def grouped(self, num_kv_heads: int) -> Lanes:
        """Lanes for grouped-query attention, whose G query heads share one key head.

        Lanes that differ from head to head are laid side by side, G times as many, and every query head reads its own.

        Returns:
            Lanes with ``key`` of shape (..., 1 or num_kv_heads, K, P').
        """
        num_heads = self.query.shape[-3]
        if self.num_shared == self.num_lanes or num_kv_heads == num_heads:
            return self
        group = num_heads // num_kv_heads
        shared_key, own_key = self.key.split([self.num_shared, self.num_lanes - self.num_shared], dim=-1)
        shared_query, own_query = self.query.split([self.num_shared, own_key.shape[-1]], dim=-1)
        own_key = own_key.unflatten(-3, (num_kv_heads, group)).movedim(-3, -2).flatten(-2)
        choice = torch.eye(group, dtype=own_query.dtype, device=own_query.device).repeat(num_kv_heads, 1)
        own_query = (own_query.unsqueeze(-2) * choice[:, None, :, None]).flatten(-2)
        query = torch.cat([shared_query, own_query], dim=-1)
        key = torch.cat([shared_key.unflatten(-3, (num_kv_heads, group)).select(-3, 0), own_key], dim=-1)
        return Lanes(query, key, self.num_shared, self.factors, self.terms)


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the last axis after broadcasting the others."""
    if len(tensors) == 1:
        return tensors[0]
    shape = torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in tensors))
    return torch.cat([tensor.expand(*shape, tensor.shape[-1]) for tensor in tensors], dim=-1)
