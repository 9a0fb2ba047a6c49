"""Which lane holds what: the plan that :mod:`eotattn.kernels.join` works by, as Python numbers and as tensors.

Legend: H query heads, L tokens, C feature columns, F factors, S slots, W lanes.

Lane c of head h at token l is term t_c of x = sum_s coefficient[h, s, c] * features[l, s, c], where the terms are the
numbers of the kernel's dtype whose sum is x, largest first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MAX_TENSORS", "Layout", "Maps", "PartShape", "read_layout", "tile_width"]

NOTHING = -1
#: The term of a lane that is zero and yet has the gradient of its slots.
IDLE = -1
#: A factor of at most so many slots is evaluated column by column, a wider one once for each token.
NARROW = 2
#: Numbers that describe a slot: feature column, coefficient tensor, its column, its width, row of scales, by size.
SLOT = 6
#: Lanes and slots in which one coefficient can have a gradient; the last entry of a row counts them.
ENTRIES = 16
#: Coefficient tensors that a kernel takes.
MAX_TENSORS = 8


class PartShape(NamedTuple):
    """What of a prior's part decides the layout, in numbers, so that a compiled graph can hold it.

    Args:
        sources: (F, S) indices of coefficients.
        widths: Columns of each coefficient tensor.
        learns_query: Whether the query side is learned, else the key side.
        terms: Numbers of the kernel's dtype that a factor is split into.
        is_exact: Whether the fixed side is exact in one number.
        by_size: Whether the size of coefficients counts and not their sign.
        has_row: Whether each side has one more feature column: a row term's, and ones.
        has_rest: Whether a lane returns the row term's gradient.
    """

    sources: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    learns_query: bool
    terms: int
    is_exact: bool
    by_size: bool
    has_row: bool
    has_rest: bool

    def numbers(self) -> list[int]:
        """The part as whole numbers; :func:`read_layout` reads them."""
        flags = [self.learns_query, self.terms, self.is_exact, self.by_size, self.has_row, self.has_rest]
        sizes = [len(self.widths), *self.widths, len(self.sources), len(self.sources[0])]
        return [*map(int, flags), *sizes, *(index for slots in self.sources for index in slots)]


class _Column(NamedTuple):
    """One lane of one side.

    Args:
        slots: Pairs (feature column, coefficient index); the coefficient ``NOTHING`` is the constant one.
        term: Which term of the split, or ``IDLE``.
        member: Which of the query heads that share a key head this lane is for, or ``NOTHING`` for all of them.
        learned: Whether the side is the learned one, which carries the kernel's inverse scale and has gradients.
    """

    slots: tuple[tuple[int, int], ...]
    term: int
    member: int
    learned: bool

    @property
    def is_wide(self) -> bool:
        """Whether its factor is evaluated once a token: it has many slots, or differs between the heads of a group."""
        return len(self.slots) > NARROW or (self.learned and self.member != NOTHING)


class _Coefficient(NamedTuple):
    """Where a learned number is: tensor, column in it, columns of it, row of scales, by size, place in a gradient."""

    tensor: int
    column: int
    stride: int
    scale: int
    by_size: int
    place: int


class Maps(NamedTuple):
    """A layout in tensors.

    ``query`` and ``key`` are (4 + 2 SLOT, tile width) int32: term, member, learned flag and wide factor of each lane,
    then two slots. ``query_wide`` and ``key_wide`` are (factors, SLOT, widest) int32: every slot of a wide factor.
    ``owners`` is (N, 2 + SLOT + ENTRIES) int32: side, wide factor, the coefficient, and where its gradients lie.
    ``scales`` is (parts, H) float32.
    """

    query: Tensor
    key: Tensor
    query_wide: Tensor
    key_wide: Tensor
    owners: Tensor
    scales: Tensor
    num_wide: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Layout:
    """The lanes of both sides.

    Args:
        parts: What they are made of.
        scales: (parts, H) factors on coefficients.
        group: Query heads that share a key head.
    """

    parts: tuple[PartShape, ...]
    scales: tuple[tuple[float, ...], ...]
    group: int
    _columns: tuple[list[_Column], list[_Column]] = field(init=False, repr=False)
    _maps: dict[tuple[torch.device, int], Maps] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_columns", _columns(self.parts, self.group))

    @property
    def num_lanes(self) -> int:
        """Lanes of either side."""
        return len(self._columns[0])

    @property
    def num_heads(self) -> int:
        """Query heads H."""
        return len(self.scales[0])

    def maps(self, device: torch.device, spare: int) -> Maps:
        """The layout as tensors for a kernel with ``spare`` columns beside the content, made once a device."""
        maps = self._maps.get((device, spare))
        if maps is None:
            with torch.inference_mode(False):
                maps = self._maps[device, spare] = _make_maps(self, device, spare)
        return maps

    def coefficients(self) -> list[_Coefficient]:
        """Every learned number of one head, in order."""
        found: list[_Coefficient] = []
        tensor = place = 0
        for row, part in enumerate(self.parts):
            for width in part.widths:
                found += [_Coefficient(tensor, j, width, row, int(part.by_size), place + j) for j in range(width)]
                tensor, place = tensor + 1, place + width * self.num_heads
        return found


@lru_cache(maxsize=1024)
def read_layout(numbers: tuple[int, ...], scales: tuple[float, ...], num_heads: int, num_kv_heads: int) -> Layout:
    """The layout that :meth:`PartShape.numbers` of all parts, and their scales one after the other, describe."""
    parts = tuple(_parts(iter(numbers)))
    rows = tuple(scales[n * num_heads : (n + 1) * num_heads] for n in range(len(parts)))
    return Layout(parts, rows, num_heads // num_kv_heads)


def _parts(numbers: Iterator[int]) -> Iterator[PartShape]:
    for learns_query in numbers:
        terms, is_exact, by_size, has_row, has_rest = (next(numbers) for _ in range(5))
        widths = tuple(next(numbers) for _ in range(next(numbers)))
        factors, slots = next(numbers), next(numbers)
        sources = tuple(tuple(next(numbers) for _ in range(slots)) for _ in range(factors))
        flags = (bool(is_exact), bool(by_size), bool(has_row), bool(has_rest))
        yield PartShape(sources, widths, bool(learns_query), terms, *flags)


def _columns(parts: Sequence[PartShape], group: int) -> tuple[list[_Column], list[_Column]]:
    """Lanes of all parts side by side: every product of terms that matters, once for each head that needs its own."""
    sides: tuple[list[_Column], list[_Column]] = ([], [])  # query, key
    feature, coefficient = [0, 0], 0
    for part in parts:
        learned, fixed = (0, 1) if part.learns_query else (1, 0)
        factors, slots = len(part.sources), len(part.sources[0])
        terms = range(part.terms)
        pairs = [(a, b) for a in terms for b in terms if a + b < part.terms and (b == 0 or not part.is_exact)]
        for member in [NOTHING] if part.learns_query else range(group):
            for a, b in pairs:
                for f, sources in enumerate(part.sources):
                    first = feature[learned] + f * slots
                    filled = tuple((first + s, coefficient + n) for s, n in enumerate(sources))
                    sides[learned].append(_Column(filled, a, member, learned=True))
                    sides[fixed].append(_Column(((feature[fixed] + f, NOTHING),), b, member, learned=False))
        feature[learned] += factors * slots
        feature[fixed] += factors
        if part.has_rest:
            sides[0].append(_Column(((feature[0], coefficient),), IDLE, NOTHING, learned=True))
            sides[1].append(_Column(((feature[1], NOTHING),), 0, NOTHING, learned=False))
        if part.has_row:
            feature = [feature[0] + 1, feature[1] + 1]
        coefficient += sum(part.widths)
    return sides


def _make_maps(layout: Layout, device: torch.device, spare: int) -> Maps:
    numbers, tile = layout.coefficients(), tile_width(spare)
    owners = [[0] * (2 + SLOT + ENTRIES) for _ in numbers]
    sides: list[list[list[int]]] = []
    wides: list[list[list[list[int]]]] = []
    for side, columns in enumerate(layout._columns):
        rows = [[0] * tile, [NOTHING] * tile, [0] * tile, [NOTHING] * tile]
        rows += [[NOTHING if r < 2 else 0] * tile for _ in range(NARROW) for r in range(SLOT)]
        wide = list(dict.fromkeys(column.slots for column in columns if column.is_wide))
        for lane, column in enumerate(columns):
            which = wide.index(column.slots) if column.is_wide else NOTHING
            for r, entry in enumerate((column.term, column.member, int(column.learned), which)):
                rows[r][lane] = entry
            for s, (feature, index) in enumerate(() if column.is_wide else column.slots):
                for r, entry in enumerate(_slot(feature, index, numbers)):
                    rows[4 + SLOT * s + r][lane] = entry
                if index != NOTHING and column.term in (0, IDLE):
                    _own(owners[index], side, NOTHING, numbers[index], s * tile + lane)
        widest = tile_width(max([16, *map(len, wide)]))
        table = [[[NOTHING if r < 2 else 0] * widest for r in range(SLOT)] for _ in wide or [()]]
        for w, slots in enumerate(wide):
            for s, (feature, index) in enumerate(slots):
                for r, entry in enumerate(_slot(feature, index, numbers)):
                    table[w][r][s] = entry
                _own(owners[index], side, w, numbers[index], s)
        sides.append(rows)
        wides.append(table)
    query, key, query_wide, key_wide, owner = (
        torch.tensor(table, dtype=torch.int32, device=device) for table in (*sides, *wides, owners)
    )
    num_wide = tuple(len({column.slots for column in columns if column.is_wide}) for columns in layout._columns)
    scales = torch.tensor(layout.scales, dtype=torch.float32, device=device)
    return Maps(query, key, query_wide, key_wide, owner, scales, (num_wide[0], num_wide[1]))


def _slot(feature: int, index: int, numbers: Sequence[_Coefficient]) -> tuple[int, ...]:
    return (feature, NOTHING, 0, 0, 0, 0) if index == NOTHING else (feature, *numbers[index][:-1])


def _own(owner: list[int], side: int, wide: int, number: _Coefficient, place: int) -> None:
    """Note that the gradient at ``place`` of a side's sums belongs to a coefficient."""
    owner[: 2 + SLOT] = [side, wide, *number]
    count = owner[-1]
    assert count < ENTRIES - 1
    owner[2 + SLOT + count] = place
    owner[-1] = count + 1


def tile_width(width: int) -> int:
    """The next power of two."""
    return 1 << (width - 1).bit_length()
