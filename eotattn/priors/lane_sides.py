"""The two sides of a lane plan: how the table and the matrix of queries, or of keys, are made.

Legend: B batch, H heads, M query heads a key head, L positions, P lanes, C columns of a table, N coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eotattn.priors.splitting import MOST_PIECES, multiply, split_numbers, write_pieces
from eotattn.priors.terms import FEATURES, computing_dtype

__all__ = ["Column", "Lane", "Shape", "Side", "SideLayout", "SidePlan"]


class Side(NamedTuple):
    """What the lanes of one side are made of: pieces of (table @ matrix), and numbers that are lanes as they are.

    Args:
        table: (L, C) or (B, L, C), float32 or float64.
        matrix: (1 or heads, C, P), in the dtype of the table.
        piece: (P,) int8: which piece of its product a lane is.
        depth: Pieces of a product at most.
        more: (..., heads, L, P') further lanes behind them, in the kernel's dtype, or ``None``.
        gains: (B, heads, L, P) factors of a query's own on the products, or ``None``.
        constant: (P,) boolean: which products, where there are such factors, have no value but a gradient.
    """

    table: Tensor
    matrix: Tensor
    piece: Tensor
    depth: int
    more: Tensor | None = None
    gains: Tensor | None = None
    constant: Tensor | None = None

    def lanes(self, dtype: torch.dtype) -> Tensor:
        """(heads, L, P + P') or (B, heads, L, P + P') in ``dtype``."""
        products = multiply(self.table, self.matrix)
        if self.gains is not None:
            products = self.gains.to(products.dtype) * products
            assert self.constant is not None
            products = torch.where(self.constant, products - products.detach(), products)
        lanes = products.to(dtype) if self.depth == 1 else write_pieces(products, self.piece, self.depth, dtype)
        if self.more is None:
            return lanes
        lead = torch.broadcast_shapes(lanes.shape[:-1], self.more.shape[:-1])
        return torch.cat([side.expand(*lead, side.shape[-1]) for side in (lanes, self.more)], dim=-1)


class Shape(NamedTuple):
    """What decides the lanes of one term."""

    features: str
    num_query: int
    num_key: int  # 0: a term of keys that is looked up
    by_key_head: bool = False  # such a term that query heads share with their key head


class Column(NamedTuple):
    """A column of a table: a feature, or a piece of it divided by a power of two."""

    term: int
    feature: int
    piece: int | None = None
    divisor: float = 1.0


class Lane(NamedTuple):
    """One lane: a piece of a fixed feature against a piece of what is learned.

    Args:
        learned: ``"query"`` or ``"key"``.
        fixed: The fixed column.
        piece: Which piece of the learned factor.
        member: The one of the query heads that share a key head; ``None`` for all of them.
        is_constant: Whether its key feature is one everywhere: a constant of each row, that softmax does not see.
        truncation: Relative error of the product that this lane leads; zero for the others.
    """

    learned: str
    fixed: Column
    piece: int
    member: int | None
    is_constant: bool
    truncation: float


@dataclass(frozen=True, eq=False)
class SidePlan:
    """How the table and the matrix of one side are made.

    Args:
        columns: C columns of the table.
        selection: (N or M N, C * P) float64: from the coefficients of a head (key head) to its matrix.
        fixed: (1 or heads, C, P) float64: what is in the matrix besides.
        piece: (P,) int8.
        constant: What of the selection has a gradient but no value: constants of each row.
        depth: Pieces of a product at most.
    """

    columns: tuple[Column, ...]
    selection: Tensor | None
    fixed: Tensor
    piece: Tensor
    constant: Tensor | None
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


@dataclass(frozen=True)
class SideLayout:
    """From lanes to the plan of each side.

    Args:
        shapes: One a term.
        num_heads: H.
        group: M.
        query_scale: Factor on what is learned.
        lift: The query's share of it where the key's number is looked up.
        gained: Terms on which queries have factors of their own.
    """

    shapes: Sequence[Shape]
    num_heads: int
    group: int
    query_scale: float
    lift: float
    gained: Sequence[int] = ()

    def side(self, side: str, lanes: Sequence[Lane]) -> SidePlan:
        """The plan of one side."""
        columns = list(dict.fromkeys(column for lane in lanes for column in self._columns(side, lane)))
        at = {column: c for c, column in enumerate(columns)}
        num_weights = self._first_weight(len(self.shapes))
        share = self.group if side == "key" else 1
        apart = side == "query" and any(lane.member is not None for lane in lanes)
        selection = torch.zeros(share * num_weights, len(columns), len(lanes), dtype=torch.float64)
        fixed = torch.zeros(self.num_heads if apart else 1, len(columns), len(lanes), dtype=torch.float64)
        for p, lane in enumerate(lanes):
            if lane.learned != side:
                owners = slice(None) if lane.member is None else slice(lane.member, None, self.group)
                fixed[owners, at[lane.fixed], p] = 1.0 if self.shapes[lane.fixed.term].num_key else self.lift
                continue
            for n, feature, sign in self._learned(side, lane):
                row = n + (lane.member or 0) * num_weights
                selection[row, at[Column(lane.fixed.term, feature)], p] = sign * self.query_scale * lane.fixed.divisor
        pieces = [lane.piece if lane.learned == side else 0 for lane in lanes]
        zeroed = [lane.is_constant and lane.learned == side and lane.fixed.term not in self.gained for lane in lanes]
        is_constant = torch.tensor(zeroed, dtype=torch.bool)
        learns = any(lane.learned == side for lane in lanes)
        return SidePlan(
            columns=tuple(columns),
            selection=selection.flatten(1) if learns else None,
            fixed=fixed,
            piece=torch.tensor(pieces, dtype=torch.int8),
            constant=(selection * is_constant).flatten(1) if learns and bool(is_constant.any()) else None,
            depth=max(pieces, default=0) + 1,
        )

    def _columns(self, side: str, lane: Lane) -> list[Column]:
        """Columns of the table that a lane reads on one side."""
        if lane.learned != side:
            return [lane.fixed]
        return list(dict.fromkeys(Column(lane.fixed.term, feature) for _, feature, _ in self._learned(side, lane)))

    def _learned(self, side: str, lane: Lane) -> list[tuple[int, int, float]]:
        """(coefficient of a head, feature of the learned side, sign) of what meets the lane's fixed feature."""
        first, entries = self._first_weight(lane.fixed.term), FEATURES[self.shapes[lane.fixed.term].features].entries
        if side == "query":
            return [(first + n, query, sign) for n, query, key, sign in entries if key == lane.fixed.feature]
        return [(first + n, key, sign) for n, query, key, sign in entries if query == lane.fixed.feature]

    def _first_weight(self, term: int) -> int:
        return sum(_num_coefficients(shape) for shape in self.shapes[:term])


def _num_coefficients(shape: Shape) -> int:
    """N of one term; none of a term that is looked up."""
    return 1 + max(entry[0] for entry in FEATURES[shape.features].entries) if shape.num_key else 0
