"""Which lane holds what: decided once, from constants of a prior and the number format of a kernel.

Legend: H heads, Hk key heads, M query heads a key head, L positions, K keys, P lanes.

The lanes of both sides are one linear map of a table of features: lanes = pieces(table @ matrix). In a term
query_features . weights . key_features one side is *fixed*: its matrix picks features from the table. The other side is
*learned*: its matrix holds the weights. A number of a 16-bit dtype keeps few digits, so a factor is written as a sum of
several such numbers, *pieces*, and the products of pieces that matter are lanes; they are summed in the kernel's
accumulator. Which lanes there are depends on constants alone, never on parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eotattn.compat import plain_tensors
from eotattn.priors.lane_sides import Column, Lane, Shape, Side, SideLayout, SidePlan
from eotattn.priors.memory import MadeInGraphs, constants, remembered
from eotattn.priors.probing import FeatureFacts, Span, probe
from eotattn.priors.splitting import MOST_PIECES, significant_digits, split_numbers, unit_roundoff
from eotattn.priors.terms import FEATURES, PREPARED, KeyTerm, Term, computing_dtype
from eotattn.priors.weight_map import Learned, WeightMap, map_weights, weight_map

__all__ = ["LanePlan", "LaneRequest", "plan_lanes"]


class LaneRequest(NamedTuple):
    """What lanes are made for.

    Args:
        num_heads: Query heads H.
        num_kv_heads: Key heads Hk.
        dtype: The kernel's dtype.
        num_coordinates: Numbers that make a position.
        span: What is known of the positions.
        tolerance: Error that lanes may add, nats; by default about what content's own rounding costs.
        query_scale: Factor on the inner product.
        has_fixed_keys: Whether keys must be free of weights, as stored ones are; then lanes that only have gradients
            are left out. Otherwise weights are on the side that makes fewer lanes.
        gained: Terms on which queries have factors of their own; their weights are with the queries.
    """

    num_heads: int
    num_kv_heads: int
    dtype: torch.dtype
    num_coordinates: int = 1
    span: Span = Span()
    tolerance: float | None = None
    query_scale: float = 1.0
    has_fixed_keys: bool = False
    gained: tuple[int, ...] = ()

    @property
    def group(self) -> int:
        """Query heads that share a key head, M."""
        return self.num_heads // self.num_kv_heads

    @property
    def lift(self) -> float:
        """A power of two, about the root of the scale: the query's share of it, where the key's number is looked up."""
        return 2.0 ** round(math.log2(self.query_scale) / 2)


@dataclass(frozen=True, eq=False)
class LanePlan(MadeInGraphs):
    """Which lane holds what.

    Args:
        names: Features of the terms.
        request: What the lanes are made for.
        query: The query's side.
        key: The key's side, without the lanes of terms that are looked up.
        looked_up: Those lanes, behind the others.
        truncation: P relative errors.
        is_relative: Which terms may count positions from anywhere.
        left_out: (term, key feature) whose products are constants of each row, in no lane's value.
        lanes: The lanes themselves, in order.
    """

    names: tuple[str, ...]
    request: LaneRequest
    query: SidePlan
    key: SidePlan
    looked_up: tuple[Lane, ...]
    truncation: tuple[float, ...]
    is_relative: tuple[bool, ...]
    lanes: tuple[Lane, ...]
    left_out: tuple[tuple[int, int], ...] = ()

    @property
    def num_lanes(self) -> int:
        """Prior width P."""
        return len(self.truncation)

    def table(self, side: str, positions: Tensor, origin: Tensor | float) -> Tensor:
        """The table of one side at (L,) or (B, L) positions (with coordinates last on grids)."""
        at = positions.double()
        shifted = at - origin if any(self.is_relative) else at
        each = [shifted if relative else at for relative in self.is_relative]
        return getattr(self, side).table(self.names, side, each, self.request.dtype)

    def run_table(self, side: str, first: int, length: int, origin: int, device: torch.device) -> Tensor:
        """The table at ``length`` consecutive positions."""
        return self.table(side, torch.arange(first, first + length, device=device), origin)

    def sides(
        self,
        terms: Sequence[Term | KeyTerm],
        tables: tuple[Tensor, Tensor],
        more: Tensor | None = None,
        held: WeightMap | None = None,
    ) -> tuple[Side, Side]:
        """Both sides at tables of features, with further lanes of the keys; ``held`` is what :meth:`held` returns."""
        query, key = tables
        held = self.held(terms, query.device, query.dtype) if held is None else held
        numbers: list[Tensor] = []
        for term in terms:
            if isinstance(term, Term):
                numbers += term.numbers
        matrices = map_weights(held, (self.query.fixed.shape, self.key.fixed.shape), query.dtype, numbers)
        return (
            Side(query, matrices[0], held.pieces[0], self.query.depth),
            Side(key, matrices[1], held.pieces[1], self.key.depth, more),
        )

    def held(self, terms: Sequence[Term | KeyTerm], device: torch.device, dtype: torch.dtype) -> WeightMap:
        """How learned numbers enter the matrices, put on a device once; a graph takes it as inputs."""
        learned = tuple([(term.widths, term.units) for term in terms if isinstance(term, Term)])
        if torch.compiler.is_compiling():
            held: WeightMap = getattr(self, self.make_in_graph("_held", learned, device, dtype, True))
            return held
        return remembered((self, learned, dtype), device, lambda: self._held(learned, device, dtype, False))

    def _held(
        self, learned: Sequence[tuple[Any, Any]], device: torch.device, dtype: torch.dtype, in_graph: bool
    ) -> WeightMap:
        of_terms = tuple([Learned(*one) for one in learned])
        heads = (self.request.num_heads, self.request.num_kv_heads)
        return weight_map((self.query, self.key), of_terms, heads, device, dtype, in_graph=in_graph)

    def with_gains(self, side: Side, gains: Sequence[Tensor | None]) -> Side:
        """The side of queries with their own factors (B, H, Q), one a term or ``None``, on the lanes of the terms."""
        given = [gain for gain in gains if gain is not None]
        if not given:
            return side
        at = {term: n for n, term in enumerate(t for t, gain in enumerate(gains) if gain is not None)}
        table = torch.stack([*given, torch.ones_like(given[0])], dim=-1)
        chosen = tuple([at.get(lane.fixed.term, len(given)) for lane in self.lanes])
        constant = tuple([int(lane.is_constant and lane.fixed.term in at) for lane in self.lanes])
        index, is_constant = (constants(numbers, table.device, torch.int64) for numbers in (chosen, constant))
        return side._replace(gains=table[..., index], constant=is_constant > 0)

    def more_of_keys(self, terms: Sequence[Term | KeyTerm], positions: Tensor) -> Tensor | None:
        """Lanes of what is looked up by key: (..., Hk, K, P')."""
        request, pieces = self.request, {}
        for number in dict.fromkeys(lane.fixed.term for lane in self.looked_up):
            term = terms[number]
            assert isinstance(term, KeyTerm)
            bias = term.bias(positions).to(computing_dtype(request.dtype)) * (request.query_scale / request.lift)
            heads = request.num_kv_heads if term.by_key_head else request.num_heads
            bias = bias.expand(*bias.shape[:-2], heads, -1).unflatten(-2, (request.num_kv_heads, -1))
            rest = split_numbers(bias.detach(), request.dtype, MOST_PIECES)[1:]
            pieces[number] = [bias.to(request.dtype), *rest]  # the leading piece carries the derivative
        lanes = [pieces[lane.fixed.term][lane.piece][..., lane.member or 0, :] for lane in self.looked_up]
        if not lanes:
            return None
        return torch.stack(torch.broadcast_tensors(*lanes), dim=-1)  # some differ by sample, some do not


def plan_lanes(terms: Sequence[Term | KeyTerm], request: LaneRequest) -> LanePlan:
    """Decide which lanes a log-prior of at least one term has; remembered for equal constants."""
    shapes = tuple([_shape(term) for term in terms])
    if torch.compiler.is_compiling():
        features, plain = terms[0].features, tuple([tuple(shape) for shape in shapes])  # tracing knows no named ones
        return getattr(features, features.prepare("plan", plain, tuple(request), tuple(request.span)))
    return _plan(shapes, request)


def _shape(term: Term | KeyTerm) -> Shape:
    if isinstance(term, KeyTerm):
        return Shape(term.features.name, 1, 0, term.by_key_head)
    return Shape(term.features.name, *term.features.num_features)


@lru_cache(maxsize=512)
@plain_tensors()
def _plan(shapes: tuple[Shape, ...], request: LaneRequest) -> LanePlan:
    """The plan that these constants decide."""
    lanes: list[Lane] = []
    looked_up: list[Lane] = []
    left_out: list[tuple[int, int]] = []
    members: Iterable[int | None] = range(request.group)
    for number, shape in enumerate(shapes):
        splitting = _Splitting(number, shape, request)
        if shape.num_key == 0:
            looked_up += splitting.lanes("key", (None,) if shape.by_key_head else members)
            continue
        by_query = splitting.lanes("query", (None,))
        by_key = splitting.lanes("key", members if request.group > 1 else (None,))
        by_queries = request.has_fixed_keys or number in request.gained or len(by_query) <= len(by_key)
        chosen = by_query if by_queries else by_key
        left_out += dict.fromkeys((number, lane.fixed.feature) for lane in chosen if lane.is_constant)
        lanes += [lane for lane in chosen if not (request.has_fixed_keys and lane.is_constant)]
    layout = SideLayout(shapes, request.num_heads, request.group, request.query_scale, request.lift, request.gained)
    return LanePlan(
        names=tuple(shape.features for shape in shapes),
        request=request,
        query=layout.side("query", [*lanes, *looked_up]),
        key=layout.side("key", lanes),
        looked_up=tuple(looked_up),
        is_relative=tuple(FEATURES[shape.features].is_relative for shape in shapes),
        left_out=tuple(left_out),
        truncation=tuple(lane.truncation for lane in (*lanes, *looked_up)),
        lanes=(*lanes, *looked_up),
    )


def _plan_of_tuples(shapes: Sequence[tuple], request: tuple, span: tuple) -> LanePlan:
    return _plan(tuple(Shape(*shape) for shape in shapes), LaneRequest(*request)._replace(span=Span(*span)))


PREPARED["plan"] = _plan_of_tuples


@dataclass(frozen=True)
class _Splitting:
    """How the factors of one term are written in the kernel's dtype."""

    term: int
    shape: Shape
    request: LaneRequest

    def lanes(self, learned: str, members: Iterable[int | None]) -> list[Lane]:
        """The lanes that the term has if ``learned`` is the side of its weights."""
        fixed = "key" if learned == "query" else "query"
        facts = probe(self.shape.features, fixed, self.request.num_coordinates, self.request.span)
        return [
            lane
            for member in members
            for feature, fact in enumerate(facts)
            for lane in self._lanes_of_feature(learned, member, feature, fact)
        ]

    def _lanes_of_feature(self, learned: str, member: int | None, feature: int, fact: FeatureFacts) -> list[Lane]:
        """The products of pieces of a fixed feature and of what is learned that matter, the leading one first."""
        is_constant = learned == "query" and fact.is_one
        learned_pieces = self._pieces(self._typical)
        fixed_pieces, is_exact = self._fixed_pieces(fact)
        truncation = 0.0 if is_constant else self._truncation(learned_pieces, fixed_pieces, fact, is_exact=is_exact)
        return [
            Lane(
                learned=learned,
                fixed=Column(self.term, feature, b, self._divisor(fact)),
                piece=a,
                member=member,
                is_constant=is_constant,
                truncation=truncation if a == b == 0 else 0.0,
            )
            for a in range(1 if is_constant else learned_pieces)
            for b in range(fixed_pieces)
            if is_exact or a + b < max(learned_pieces, fixed_pieces)
        ]

    @property
    def _typical(self) -> float:
        return FEATURES[self.shape.features].typical_range

    @property
    def _is_wide(self) -> bool:
        """Whether lanes are computed in the kernel's own dtype, so that one piece is all there is."""
        return self.request.dtype == computing_dtype(self.request.dtype)

    def _divisor(self, fact: FeatureFacts) -> float:
        """The power of two that shares the size of the product between both sides, so that neither leaves its range."""
        if self.shape.num_key == 0:
            return 1.0
        return 2.0 ** round(math.log2((fact.largest or 1.0) / self.request.query_scale) / 2)

    def _pieces(self, size: float) -> int:
        """Pieces of a factor of ``size`` nats that leave less than the tolerance."""
        if self._is_wide:
            return 1
        roundoff = unit_roundoff(self.request.dtype)
        tolerance = 2 * roundoff if self.request.tolerance is None else self.request.tolerance
        fits = [count for count in range(1, MOST_PIECES) if size * roundoff**count <= tolerance]
        return fits[0] if fits else MOST_PIECES

    def _fixed_pieces(self, fact: FeatureFacts) -> tuple[int, bool]:
        """Pieces of a fixed feature, and whether they hold it exactly, as they do whole numbers."""
        if self._is_wide:
            return 1, True
        count = max(1, math.ceil(math.log2(fact.largest + 1) / significant_digits(self.request.dtype)))
        if fact.is_whole and count <= MOST_PIECES:
            return count, True
        return self._pieces(self._typical * max(fact.largest, 1.0)), False

    def _truncation(self, learned_pieces: int, fixed_pieces: int, fact: FeatureFacts, *, is_exact: bool) -> float:
        """Relative error that the pieces leave of a product, and the phases of its features in float64."""
        lost = 0.0 if fact.is_whole else 2.0**self.request.span.bits * torch.finfo(torch.float64).eps
        if self._is_wide:
            return lost
        roundoff = unit_roundoff(self.request.dtype)
        left = roundoff**learned_pieces + (0.0 if is_exact else fixed_pieces * roundoff**fixed_pieces)
        return lost + left * (1 + 4 * roundoff)
