"""Which lane holds what: decided once, from constants of a prior and the number format of a kernel.

Legend: B batch, H heads, Hk key heads, M query heads a key head, L positions, Q queries, K keys, P lanes; F query
features, G key features, C columns of a table, N weights of a head.

The lanes of both sides are one linear map of a table of features: lanes = split(table @ matrix). In a term
query_features . weights . key_features one side is *fixed*: its matrix picks features from the table. The other side is
*learned*: its matrix holds the weights. A number of a 16-bit dtype keeps few digits, so a factor is written as a sum of
several such numbers, *pieces*, and the products of pieces that matter are lanes; they are summed in the kernel's
accumulator. Which lanes there are depends on constants alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from eotattn.checks import check_positive
from eotattn.compat import allows_tf32
from eotattn.priors.base import computing_dtype
from eotattn.priors.bilinear import FEATURES, PREPARED, KeyTerm, Term
from eotattn.priors.tables import remembered

__all__ = ["LanePlan", "Side", "Span", "bits_of", "constant_key_features", "lift", "plan_lanes", "split_numbers"]

#: Pieces of a factor at most: three numbers of bfloat16 hold all 24 digits of the float32 accumulator.
MOST_PIECES = 3
#: Bits of a position that are planned for, in steps: up to 65 535, then up to 16 777 215, ...
REACH_STEP = 8
FEWEST_BITS = 16


class Span(NamedTuple):
    """What is known of the positions of a call before lanes are planned.

    Args:
        bits: No position is 2 ** bits or more from zero.
        relative_bits: Nor from the origin that relative terms count from.
        whole: Whether all of them are whole numbers.
    """

    bits: int = FEWEST_BITS
    relative_bits: int = FEWEST_BITS
    whole: bool = True


class Side(NamedTuple):
    """What the lanes of one side are made of: pieces of (table @ matrix), and numbers that are lanes as they are.

    Args:
        table: (L, C) or (B, L, C), float32 or float64.
        matrix: (1 or heads, C, P), in the dtype of the table.
        piece: (P,) int8: which piece of its product a lane is.
        depth: Pieces of a product at most.
        more: (..., heads, L, P') further lanes behind them, in the kernel's dtype, or ``None``.
    """

    table: Tensor
    matrix: Tensor
    piece: Tensor
    depth: int
    more: Tensor | None = None

    def lanes(self, dtype: torch.dtype) -> Tensor:
        """(heads, L, P + P') or (B, heads, L, P + P') in ``dtype``."""
        lanes = write_pieces(multiply(self.table, self.matrix), self.piece, self.depth, dtype)
        if self.more is None:
            return lanes
        lead = torch.broadcast_shapes(lanes.shape[:-1], self.more.shape[:-1])
        return torch.cat([side.expand(*lead, side.shape[-1]) for side in (lanes, self.more)], dim=-1)


def multiply(table: Tensor, matrix: Tensor) -> Tensor:
    """table @ matrix for every head, exact enough whatever precision the user allows matrix products."""
    if table.device.type == "cuda" and table.dtype == torch.float32 and allows_tf32():
        return (table.double().unsqueeze(-3) @ matrix.double()).float()
    return table.unsqueeze(-3) @ matrix


def write_pieces(value: Tensor, piece: Tensor, depth: int, dtype: torch.dtype) -> Tensor:
    """Piece number ``piece`` (P,) of ``value`` (..., P); derivatives are those of the leading pieces.

    The corrections are differences that cancel, so the leading piece carries the whole derivative.
    """
    lanes = value.to(dtype)
    if depth > 1:
        for number, rest in enumerate(split_numbers(value.detach(), dtype, depth)[1:], start=1):
            lanes = torch.where(piece == number, rest, lanes)
    return lanes


def split_numbers(value: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Write ``value`` as a sum of ``count`` tensors of ``dtype``, largest first."""
    pieces = [value.to(dtype)]
    rest = value
    for _ in range(count - 1):
        rest = rest - pieces[-1].to(rest.dtype)
        pieces.append(rest.to(dtype))
    return pieces


def bits_of(largest: float) -> int:
    """Bits of a position, in the steps that are planned for."""
    needed = max(FEWEST_BITS, int(abs(largest)).bit_length())
    return -(-needed // REACH_STEP) * REACH_STEP


def lift(query_scale: float) -> float:
    """A power of two, about the root of ``query_scale``: the query's share of it, where the key is not a feature."""
    return 2.0 ** round(math.log2(query_scale) / 2)


class _Shape(NamedTuple):
    """What decides the lanes of one term."""

    features: str
    num_query: int
    num_key: int  # 0: a term of keys that is looked up


class _Column(NamedTuple):
    """A column of a table: a feature, or a piece of it divided by a power of two."""

    term: int
    feature: int
    piece: int | None
    divisor: float


class _Lane(NamedTuple):
    """One lane: a piece of a fixed feature against a piece of what is learned.

    Args:
        term: Which term.
        learned: ``"query"`` or ``"key"``.
        fixed: The fixed column.
        feature: The feature of the fixed side that the lane belongs to.
        piece: Which piece of the learned factor.
        member: The one of the query heads that share a key head; ``None`` for all of them.
        is_constant: Whether its key feature is one everywhere: a constant of each row, that softmax does not see.
        truncation: Relative error of the product that this lane leads; zero for the others.
    """

    term: int
    learned: str
    fixed: _Column
    feature: int
    piece: int
    member: int | None
    is_constant: bool
    truncation: float


@dataclass(frozen=True, eq=False)
class _SidePlan:
    """How the table and the matrix of one side are made.

    Args:
        columns: C columns of the table.
        selection: (N or M N, C * P) float64: from the weights of a head (key head) to its matrix.
        fixed: (1 or heads, C, P) float64: what is in the matrix besides.
        has_fixed: Whether any of that is not zero.
        piece: (P,) int8.
        is_constant: (P,) boolean, true where the weights only have a gradient; ``None`` if they are nowhere.
        depth: Pieces of a product at most.
    """

    columns: tuple[_Column, ...]
    selection: Tensor | None
    fixed: Tensor
    has_fixed: bool
    piece: Tensor
    is_constant: Tensor | None
    depth: int

    def table(self, names: Sequence[str], side: str, positions: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """(..., L, C) in the dtype in which lanes of ``dtype`` are computed; ``positions`` term by term, float64."""
        computing = computing_dtype(dtype)
        made: list[Tensor] = []
        for term in dict.fromkeys(column.term for column in self.columns):
            own = [column for column in self.columns if column.term == term]
            features = getattr(FEATURES[names[term]], side)(positions[term]).double()
            chosen = torch.stack([features[..., column.feature] / column.divisor for column in own], dim=-1)
            if any(column.piece is not None for column in own) and dtype != computing:
                pieces = [chosen, *(piece.double() for piece in split_numbers(chosen, dtype, MOST_PIECES))]
                order = [0 if column.piece is None else 1 + column.piece for column in own]
                chosen = torch.stack([pieces[n][..., c] for c, n in enumerate(order)], dim=-1)
            made.append(chosen.to(computing))
        if not made:
            return getattr(FEATURES[names[0]], side)(positions[0])[..., :0].to(computing)
        lead = torch.broadcast_shapes(*(part.shape[:-1] for part in made))  # samples may differ in some terms alone
        return torch.cat([part.expand(*lead, part.shape[-1]) for part in made], dim=-1)

    def matrix(self, weights: Tensor | None, key: tuple[object, ...], dtype: torch.dtype) -> Tensor:
        """(1 or heads, C, P) in ``dtype``, from the weights of the heads, float64."""
        device = torch.device("cpu") if weights is None else weights.device
        if weights is None or self.selection is None:
            return remembered((*key, "fixed", dtype), device, lambda: self.fixed.to(device, dtype))
        selection = self.selection
        chosen = remembered((*key, "selection"), device, lambda: selection.to(device))
        matrix = (weights @ chosen).unflatten(-1, self.fixed.shape[1:])
        if self.is_constant is not None:
            is_constant = self.is_constant
            mask = remembered((*key, "constant"), device, lambda: is_constant.double().to(device))
            matrix = matrix - (matrix * mask).detach()
        if not self.has_fixed:
            return matrix.to(dtype)
        return matrix.to(dtype) + remembered((*key, "fixed", dtype), device, lambda: self.fixed.to(device, dtype))


@dataclass(frozen=True, eq=False)
class LanePlan:
    """Which lane holds what: decided by constants of the prior, never by its parameters.

    Args:
        names: Features of the terms.
        key_terms: Numbers of those terms that are looked up by key.
        num_heads: H.
        num_kv_heads: Hk.
        dtype: The kernel's dtype.
        query: The query's side.
        key: The key's side, without the lanes of terms that are looked up.
        looked_up: Pieces of what is looked up, one entry a lane behind the others: (term, piece, member).
        truncation: P relative errors.
        query_scale: Factor on the inner product.
    """

    names: tuple[str, ...]
    key_terms: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    dtype: torch.dtype
    query: _SidePlan
    key: _SidePlan
    looked_up: tuple[tuple[int, int, int], ...]
    truncation: tuple[float, ...]
    query_scale: float

    @property
    def num_lanes(self) -> int:
        """Prior width P."""
        return len(self.truncation)

    @cached_property
    def is_relative(self) -> tuple[bool, ...]:
        """Which terms may count positions from anywhere."""
        return tuple(FEATURES[name].is_relative for name in self.names)

    def table(self, side: str, positions: Tensor, origin: Tensor | float) -> Tensor:
        """The table of one side at (L,) or (B, L) positions (with coordinates last on grids)."""
        at = positions.double()
        shifted = at - origin if any(self.is_relative) else at
        each = [shifted if relative else at for relative in self.is_relative]
        return getattr(self, side).table(self.names, side, each, self.dtype)

    def run_table(self, side: str, first: int, length: int, device: torch.device) -> Tensor:
        """The table at ``length`` consecutive positions; relative terms count from the middle."""
        positions = torch.arange(first, first + length, device=device)
        return self.table(side, positions, first + length // 2)

    @torch.compiler.assume_constant_result
    def prepare(self, side: str, first: int, length: int, kind: str, index: int | None) -> str:
        """Make :meth:`run_table` while a graph is traced, an input of the graph; returns the attribute holding it."""
        name = f"{side}_{length}_from_{first}_on_{kind}_{index}".replace("-", "minus_")
        device = torch.device(kind, index)
        if name not in vars(self):
            make = lambda: self.run_table(side, first, length, device)  # noqa: E731
            vars(self)[name] = remembered((self, side, first, length), device, make)
        return name

    def matrices(self, terms: Sequence[Term | KeyTerm]) -> tuple[Tensor, Tensor]:
        """Matrices of query and key, with gradients to the weights."""
        computing = computing_dtype(self.dtype)
        flat = [term.weights.flatten(1) for term in terms if isinstance(term, Term)]
        if not flat:
            return self.query.matrix(None, (self, "query"), computing), self.key.matrix(None, (self, "key"), computing)
        weights = (flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)).double()
        query = self.query.matrix(weights, (self, "query"), computing)
        return query, self.key.matrix(weights.view(self.num_kv_heads, -1), (self, "key"), computing)

    def side(self, side: str, table: Tensor, matrix: Tensor, more: Tensor | None = None) -> Side:
        """One side of a call."""
        plan = getattr(self, side)
        piece = remembered((self, side, "piece"), table.device, lambda: plan.piece.to(table.device))
        return Side(table, matrix, piece, plan.depth, more)

    def more_of_keys(self, terms: Sequence[Term | KeyTerm], positions: Tensor) -> Tensor | None:
        """Lanes of what is looked up by key: (..., Hk, K, P')."""
        if not self.looked_up:
            return None
        lanes = []
        for number, term in enumerate(terms):
            if isinstance(term, KeyTerm):
                bias = term.bias(positions).to(computing_dtype(self.dtype)) * (
                    self.query_scale / lift(self.query_scale)
                )
                bias = bias.expand(*bias.shape[:-2], self.num_heads, -1).unflatten(-2, (self.num_kv_heads, -1))
                pieces = [bias.to(self.dtype), *split_numbers(bias.detach(), self.dtype, MOST_PIECES)[1:]]
                own = [(piece, member) for owner, piece, member in self.looked_up if owner == number]
                lanes += [pieces[piece][..., member, :] for piece, member in own]
        return torch.stack(lanes, dim=-1)


def plan_lanes(
    terms: Sequence[Term | KeyTerm],
    *,
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    num_coordinates: int = 1,
    span: Span | None = None,
    tolerance: float | None = None,
    query_scale: float = 1.0,
    learned: str = "either",
) -> LanePlan:
    """Decide which lanes a log-prior has.

    Args:
        terms: The terms of the prior, at least one.
        num_heads: Query heads H.
        num_kv_heads: Key heads Hk.
        dtype: The kernel's dtype.
        num_coordinates: Numbers that make a position.
        span: What is known of the positions.
        tolerance: Error that lanes may add, nats; by default about what content's own rounding costs.
        query_scale: Factor on the inner product.
        learned: ``"query"`` keeps keys free of weights, as stored keys must be, and drops lanes that only have
            gradients; ``"either"`` puts weights on the side that makes fewer lanes.
    """
    shapes = tuple(
        [
            (term.features.name, int(term.weights.shape[1]), int(term.weights.shape[2]))
            if isinstance(term, Term)
            else (term.features.name, 1, 0)
            for term in terms
        ]
    )
    if tolerance is not None:
        tolerance = check_positive("lanes", "tolerance", tolerance)
    reach = tuple(Span() if span is None else span)
    constants = (shapes, num_coordinates, num_heads, num_kv_heads, dtype, reach, tolerance, float(query_scale), learned)
    if torch.compiler.is_compiling():
        features = terms[0].features
        return getattr(features, features.prepare("plan", *constants))
    return _plan(*constants)


@lru_cache(maxsize=512)
def _plan(
    stated: tuple[tuple[str, int, int], ...],
    num_coordinates: int,
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    span: tuple[int, int, bool],
    tolerance: float | None,
    query_scale: float,
    learned: str,
) -> LanePlan:
    """The plan that these constants decide."""
    shapes, group = [_Shape(*shape) for shape in stated], num_heads // num_kv_heads
    lanes: list[_Lane] = []
    looked_up: list[_Lane] = []
    for number, shape in enumerate(shapes):
        options = _Options(number, dtype, tolerance, query_scale, shape.num_key == 0, 2.0 ** span[0])
        query, key = (_probe(shape.features, side, num_coordinates, Span(*span)) for side in ("query", "key"))
        if shape.num_key == 0:
            looked_up += options.lanes("key", query, shape, range(group))
            continue
        by_query = options.lanes("query", key, shape, (None,))
        by_key = options.lanes("key", query, shape, range(group) if group > 1 else (None,))
        if learned == "query":
            lanes += [lane for lane in by_query if not lane.is_constant]
        else:
            lanes += by_query if len(by_query) <= len(by_key) else by_key
    sizes = [shape.num_query * shape.num_key for shape in shapes]
    offsets = [sum(sizes[:n]) for n in range(len(sizes))]
    everything = [*lanes, *looked_up]
    layout = _Layout(tuple(shapes), offsets, sum(sizes), num_heads, group, query_scale)
    return LanePlan(
        names=tuple(shape.features for shape in shapes),
        key_terms=tuple(number for number, shape in enumerate(shapes) if shape.num_key == 0),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dtype=dtype,
        query=layout.side("query", everything),
        key=layout.side("key", lanes),
        looked_up=tuple((lane.term, lane.piece, lane.member or 0) for lane in looked_up),
        truncation=tuple(lane.truncation for lane in everything),
        query_scale=query_scale,
    )


@dataclass(frozen=True)
class _Options:
    """How the factors of one term are written in the kernel's dtype."""

    term: int
    dtype: torch.dtype
    tolerance: float | None
    query_scale: float
    is_looked_up: bool
    reach: float

    def lanes(self, learned: str, fixed_features: Tensor, shape: _Shape, members: Iterable[int | None]) -> list[_Lane]:
        """The lanes that the term has if ``learned`` is the side of its weights."""
        typical = FEATURES[shape.features].typical_range
        learned_pieces = self._pieces(typical)
        made: list[_Lane] = []
        for member in members:
            for feature in range(fixed_features.shape[-1]):
                values = fixed_features[:, feature]
                largest = float(values.abs().max())
                fixed_pieces, is_exact = self._fixed_pieces(values, typical * max(largest, 1.0))
                is_constant = learned == "query" and bool((values == 1).all())
                divisor = (
                    1.0 if self.is_looked_up else 2.0 ** round(math.log2(max(largest, 1e-30) / self.query_scale) / 2)
                )
                kept = [
                    (a, b)
                    for a in range(1 if is_constant else learned_pieces)
                    for b in range(fixed_pieces)
                    if is_exact or a + b < max(learned_pieces, fixed_pieces)
                ]
                roundoff = torch.finfo(self.dtype).eps / 2
                is_whole = bool((values == values.round()).all())
                lost = 0.0 if is_whole else self.reach * torch.finfo(torch.float64).eps  # of phases in float64
                if self.dtype != computing_dtype(self.dtype):
                    left = roundoff**learned_pieces + (0.0 if is_exact else fixed_pieces * roundoff**fixed_pieces)
                    lost += left * (1 + 4 * roundoff)
                for a, b in kept:
                    column = _Column(self.term, feature, b, divisor)
                    leads = lost if a == b == 0 and not is_constant else 0.0
                    made.append(_Lane(self.term, learned, column, feature, a, member, is_constant, leads))
        return made

    def _pieces(self, size: float) -> int:
        """Pieces of a factor of ``size`` nats that leave less than the tolerance."""
        if self.dtype == computing_dtype(self.dtype):
            return 1
        roundoff = torch.finfo(self.dtype).eps / 2
        tolerance = 2 * roundoff if self.tolerance is None else self.tolerance
        fits = [count for count in range(1, MOST_PIECES) if size * roundoff**count <= tolerance]
        return fits[0] if fits else MOST_PIECES

    def _fixed_pieces(self, values: Tensor, size: float) -> tuple[int, bool]:
        """Pieces of a fixed feature, and whether they hold it exactly, as they do whole numbers."""
        if self.dtype == computing_dtype(self.dtype):
            return 1, True
        digits = 1 - round(math.log2(torch.finfo(self.dtype).eps))
        largest = float(values.abs().max())
        count = max(1, math.ceil(math.log2(largest + 1) / digits))
        if bool((values == values.round()).all()) and count <= MOST_PIECES:
            return count, True
        return self._pieces(size), False


def constant_key_features(features: str, num_coordinates: int) -> tuple[bool, ...]:
    """Which key features are one at every position: constants of each row, which softmax does not see."""
    return tuple((_probe(features, "key", num_coordinates, Span()) == 1).all(0).tolist())


def _probe(features: str, side: str, num_coordinates: int, span: Span) -> Tensor:
    """(n, features) float64 at some positions within the span: what a feature is like is found, not declared."""
    stated = FEATURES[features]
    reach = 2 ** (span.relative_bits if stated.is_relative else span.bits) - 1
    numbers = [0, 1, 2, 3, 5, 10, reach // 3, reach // 2, reach - 1, reach]
    numbers += [-number for number in numbers] if stated.is_relative else [-1]  # before the first token
    positions = torch.tensor(numbers, dtype=torch.float64)
    if not span.whole:
        positions = torch.cat([positions, positions * 0.7501])
    if num_coordinates > 1:
        small = torch.tensor(
            [-1.0, 0.0, 1.0, 2.0, 7.0] if span.whole else [-1.0, 0.0, 1.0, 0.7501], dtype=torch.float64
        )
        positions = torch.cartesian_prod(*[small] * num_coordinates)
    return getattr(stated, side)(positions).double()


@dataclass(frozen=True)
class _Layout:
    """From lanes to the tables and matrices of both sides."""

    shapes: tuple[_Shape, ...]
    offsets: list[int]
    num_weights: int
    num_heads: int
    group: int
    query_scale: float

    def side(self, side: str, lanes: Sequence[_Lane]) -> _SidePlan:
        """The plan of one side."""
        columns = list(dict.fromkeys(column for lane in lanes for column in self._columns(side, lane)))
        at = {column: c for c, column in enumerate(columns)}
        share = self.group if side == "key" else 1
        apart = side == "query" and any(lane.member is not None for lane in lanes)
        selection = torch.zeros(share * self.num_weights, len(columns), len(lanes), dtype=torch.float64)
        fixed = torch.zeros(self.num_heads if apart else 1, len(columns), len(lanes), dtype=torch.float64)
        for p, lane in enumerate(lanes):
            if lane.learned != side:
                owners = slice(None) if lane.member is None else slice(lane.member, None, self.group)
                fixed[owners, at[lane.fixed], p] = lift(self.query_scale) if self._is_looked_up(lane) else 1.0
                continue
            for column in self._columns(side, lane):
                weight = self._weight(lane, column.feature) + (lane.member or 0) * self.num_weights
                selection[weight, at[column], p] = self.query_scale * lane.fixed.divisor
        pieces = [lane.piece if lane.learned == side else 0 for lane in lanes]
        is_constant = torch.tensor([lane.is_constant and lane.learned == side for lane in lanes], dtype=torch.bool)
        return _SidePlan(
            columns=tuple(columns),
            selection=selection.flatten(1) if any(lane.learned == side for lane in lanes) else None,
            fixed=fixed,
            has_fixed=bool(fixed.any()),
            piece=torch.tensor(pieces, dtype=torch.int8),
            is_constant=is_constant if bool(is_constant.any()) else None,
            depth=max(pieces, default=0) + 1,
        )

    def _is_looked_up(self, lane: _Lane) -> bool:
        return self.shapes[lane.term].num_key == 0

    def _columns(self, side: str, lane: _Lane) -> list[_Column]:
        """Columns of the table that a lane reads on one side."""
        if lane.learned != side:
            return [lane.fixed]
        shape = self.shapes[lane.term]
        count = shape.num_query if side == "query" else shape.num_key
        return [_Column(lane.term, feature, None, 1.0) for feature in range(count)]

    def _weight(self, lane: _Lane, feature: int) -> int:
        """Where the weight of a learned feature against the lane's fixed feature stands among all of a head."""
        shape = self.shapes[lane.term]
        query, key = (feature, lane.feature) if lane.learned == "query" else (lane.feature, feature)
        return self.offsets[lane.term] + query * shape.num_key + key


PREPARED["plan"] = _plan
