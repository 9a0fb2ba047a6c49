"""Lanes: a log-prior as an inner product, in the number formats of fused kernels.

Legend: B batch, H heads, Hk key heads, L positions, Q queries, K keys, P lanes, C columns of a table.

The lanes of both sides are one linear map of a table of features: lanes = pieces(table @ matrix). Which lane holds what
is planned in :mod:`eotattn.priors.lane_plan`, what a table is made of in :mod:`eotattn.priors.lane_sides`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eotattn.priors.lane_plan import LanePlan, LaneRequest, plan_lanes
from eotattn.priors.lane_sides import Side
from eotattn.priors.memory import is_plain
from eotattn.priors.probing import Span, bits_of
from eotattn.priors.terms import KeyTerm, Term, computing_dtype

__all__ = ["Lanes", "make_lanes", "middle", "span_of"]


@dataclass(frozen=True)
class Lanes:
    """Query and key lanes of one log-prior, in the dtype of a kernel.

    <query_hi, key_hj> equals log_prior_hij up to a constant of each row (h, i), within ``error_bound``.

    Args:
        query: (..., H, Q, P).
        key: (..., 1 or Hk, K, P).
        plan: Which lane holds what.
        sides: What query and key lanes were made of.
    """

    query: Tensor
    key: Tensor
    plan: LanePlan = field(repr=False)
    sides: tuple[Side, Side] = field(repr=False)

    def __repr__(self) -> str:
        query, key = (tuple(side.shape) for side in (self.query, self.key))
        return f"Lanes(query={query}, key={key}, {self.query.dtype}, error_bound={self.error_bound:.1e} nats)"

    @property
    def num_lanes(self) -> int:
        """Prior width P."""
        return self.query.shape[-1]

    @property
    def error_bound(self) -> float:
        """Largest error of the inner product, nats: splitting, underflow, and sums in float32 (or float64).

        Follows from the largest number of every lane: with unit roundoff r of the dtype, n pieces leave r^n of a
        factor, and a sum of P products in an accumulator of roundoff r' errs by at most P r' times their sizes.
        """
        dtype = self.query.dtype
        info, accumulator = torch.finfo(dtype), torch.finfo(computing_dtype(dtype))
        query, key = (_sizes(side) for side in self.sides)
        products = query * key
        truncation = torch.tensor(self.plan.truncation, dtype=torch.float64, device=query.device)
        depth = self.num_lanes + max(side.table.shape[-1] for side in self.sides) + 4
        underflow = info.smallest_normal * info.eps * (query + key)
        return float((products * (truncation + depth * accumulator.eps / 2) + underflow).sum())

    def dense(self) -> Tensor:
        """The inner product, (..., H, Q, K), accumulated in fp32 or better as kernels do."""
        dtype = computing_dtype(self.query.dtype)
        key = self.key if self.key.shape[-3] == 1 else self.key.repeat_interleave(self._group, dim=-3)
        return self.query.to(dtype) @ key.to(dtype).transpose(-1, -2)

    @property
    def _group(self) -> int:
        return self.query.shape[-3] // self.key.shape[-3]


def _sizes(side: Side) -> Tensor:
    """(P + P',) float64: the largest that the terms of every lane can sum to."""
    table = side.table.detach().double().abs().flatten(0, -2).amax(0)
    sizes = (table @ side.matrix.detach().double().abs()).amax(0)
    if side.gains is not None:
        sizes = sizes * side.gains.detach().double().abs().flatten(0, -2).amax(0)
    if side.more is not None:
        sizes = torch.cat([sizes, side.more.detach().double().abs().flatten(0, -2).amax(0)])
    return sizes


def make_lanes(
    terms: Sequence[Term | KeyTerm], query_positions: Tensor, key_positions: Tensor, request: LaneRequest
) -> Lanes:
    """Lanes of at least one term at checked positions."""
    origin = middle(query_positions) if request.num_coordinates == 1 else 0.0
    plan = plan_lanes(terms, request._replace(span=span_of(query_positions, key_positions, origin)))
    tables = (plan.table("query", query_positions, origin), plan.table("key", key_positions, origin))
    query_side, key_side = plan.sides(terms, tables, plan.more_of_keys(terms, key_positions.double()))
    query, key = query_side.lanes(request.dtype), key_side.lanes(request.dtype)
    return Lanes(query.expand(*query.shape[:-3], request.num_heads, -1, -1), key, plan, (query_side, key_side))


def middle(positions: Tensor) -> Tensor:
    """A whole number in the middle of (L,) or (B, L) positions, of each sample: 0-d, or (B, 1)."""
    at = positions.double()
    low, high = at.amin(-1, keepdim=at.dim() > 1), at.amax(-1, keepdim=at.dim() > 1)
    return ((low + high) / 2).floor()


def span_of(query_positions: Tensor, key_positions: Tensor, origin: Tensor | float) -> Span:
    """What can be known of given positions without waiting for a device: on a GPU, only their dtype."""
    whole = not (query_positions.is_floating_point() or key_positions.is_floating_point())
    if not (_is_readable(query_positions) and _is_readable(key_positions)):
        return Span(24, 24, whole)
    sides = [positions.double() for positions in (query_positions, key_positions)]
    whole = whole or all(bool((side == side.round()).all()) for side in sides)
    largest = max(float(side.abs().max()) for side in sides)
    furthest = max(float((side - origin).abs().max()) for side in sides)
    return Span(bits_of(largest), bits_of(furthest), whole)


def _is_readable(positions: Tensor) -> bool:
    return positions.device.type == "cpu" and type(positions) is Tensor and is_plain()
