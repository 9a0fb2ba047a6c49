"""Content and lanes side by side in one launch a side, lanes evaluated on the way; needs Triton.

Legend: B batch, H heads of a side, L tokens, D content width, W kernel width, S slots, C feature columns.

Lane c of head h at token l is term t_c of x = sum_s coefficient[h, s, c] * features[l, s, c], where the terms are the
numbers of the kernel's dtype whose sum is x, largest first. What is learned enters only through the coefficients, so
the backward pass is one weighted sum over tokens, taken while the gradient of the content is copied out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eotattn.kernels.sdpa import kernel_width

__all__ = ["Column", "Join", "Layout", "join", "refusal"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOTHING = -1
#: The term of a lane that is zero and yet has the gradient of its slots.
IDLE = -1
#: A factor of at most so many slots is evaluated column by column, a wider one once for each token.
NARROW = 2
#: Lanes and slots in which one coefficient can have a gradient; the last entry of a row counts them.
ENTRIES = 16


class Column(NamedTuple):
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


@dataclass(frozen=True, eq=False)
class Layout:
    """Which lane holds what, for both sides.

    Args:
        query: The query lanes.
        key: The key lanes, as many.
        coefficients: For each coefficient tensor its number of columns, its factor a head, and whether size counts.
        num_heads: Query heads.
        num_kv_heads: Key heads.
    """

    query: tuple[Column, ...]
    key: tuple[Column, ...]
    coefficients: tuple[tuple[int, tuple[float, ...], bool], ...]
    num_heads: int
    num_kv_heads: int
    _maps: dict[tuple[torch.device, int], _Maps] = field(default_factory=dict, repr=False)

    def maps(self, device: torch.device, content_width: int, width: int) -> _Maps:
        """The layout as tensors for a kernel of ``width``, made once a device."""
        place = (device, content_width * 1024 + width)
        if place not in self._maps:
            with torch.inference_mode(False):
                self._maps[place] = _Maps.make(self, device, content_width, width)
        return self._maps[place]


class _Maps(NamedTuple):
    """The layout in tensors.

    ``query`` and ``key`` are (4 + 8, tile width) int32: term, member, learned flag and wide factor of each lane, then
    feature column, first coefficient, its stride over heads, and whether its size counts, for two slots.
    ``query_wide`` and ``key_wide`` are (factors, 4, widest) int32: the same four for every slot of a wide factor.
    ``owners`` is (N, 5 + ENTRIES): side, wide factor or -1, first entry, stride, by size, and where gradients lie.
    """

    query: Tensor
    key: Tensor
    query_wide: Tensor
    key_wide: Tensor
    owners: Tensor
    scales: Tensor
    num_wide: tuple[int, int]

    @classmethod
    def make(cls, layout: Layout, device: torch.device, content_width: int, width: int) -> _Maps:
        places: list[tuple[int, int, int]] = []  # of each coefficient: first entry, stride over heads, whether by size
        scales: list[float] = []
        for count, scale, by_size in layout.coefficients:
            places += [(len(scales) + j, count, int(by_size)) for j in range(count)]
            scales += [factor for factor in scale for _ in range(count)]
        nowhere = (NOTHING, 0, 0)
        owners = [[0] * (5 + ENTRIES) for _ in places]
        sides, wides = [], []
        for side, columns in enumerate((layout.query, layout.key)):
            tile = _tile_width(width - content_width)
            rows = [[0] * tile, [NOTHING] * tile, [0] * tile, [NOTHING] * tile]
            rows += [[NOTHING if r < 2 else 0] * tile for _ in range(NARROW) for r in range(4)]
            wide = list(dict.fromkeys(column.slots for column in columns if _is_wide(column)))
            for lane, column in enumerate(columns):
                is_wide = _is_wide(column)
                rows[0][lane], rows[1][lane], rows[2][lane] = column.term, column.member, int(column.learned)
                rows[3][lane] = wide.index(column.slots) if is_wide else NOTHING
                for s, (feature, coefficient) in enumerate(() if is_wide else column.slots):
                    place = nowhere if coefficient == NOTHING else places[coefficient]
                    for r, entry in enumerate((feature, *place)):
                        rows[4 + 4 * s + r][lane] = entry
                    if coefficient != NOTHING and column.term in (0, IDLE):
                        owner = owners[coefficient]
                        owner[:5] = [side, NOTHING, *place]
                        owner[5 + owner[5 + ENTRIES - 1]] = s * tile + lane
                        owner[5 + ENTRIES - 1] += 1
            widest = _tile_width(max([16, *map(len, wide)]))
            table = [[[NOTHING if r < 2 else 0] * widest for r in range(4)] for _ in wide or [()]]
            for w, slots in enumerate(wide):
                for s, (feature, coefficient) in enumerate(slots):
                    for r, entry in enumerate((feature, *places[coefficient])):
                        table[w][r][s] = entry
                    owners[coefficient][:6] = [side, w, *places[coefficient], s]
            sides.append(torch.tensor(rows, dtype=torch.int32, device=device))
            wides.append(torch.tensor(table, dtype=torch.int32, device=device))
        owner_table = torch.tensor(owners, dtype=torch.int32, device=device)
        num_wide = (_num_wide(layout.query), _num_wide(layout.key))
        return cls(sides[0], sides[1], wides[0], wides[1], owner_table, torch.tensor(scales, device=device), num_wide)


def _num_wide(columns: Sequence[Column]) -> int:
    return len({column.slots for column in columns if _is_wide(column)})


def _is_wide(column: Column) -> bool:
    """Whether a factor is evaluated once for each token: it has many slots, or differs between the heads of a group."""
    return len(column.slots) > NARROW or (column.learned and column.member != NOTHING)


@dataclass(frozen=True)
class Join:
    """What :func:`join` puts beside the content.

    Args:
        layout: Which lane holds what.
        query_features: (Q, C) float32.
        key_features: (K, C') float32.
        query_scale: Factor on the learned side: the inverse of the kernel's scale.
        padding: (B, K) boolean, true where a key is padding; one more lane then makes it inadmissible.
        far: Entry of that lane.
    """

    layout: Layout
    query_features: Tensor
    key_features: Tensor
    query_scale: float
    padding: Tensor | None = None
    far: float = 0.0


@cache
def _triton() -> Any:
    """The kernels, or ``None`` without Triton."""
    try:
        from eotattn.kernels import join_triton
    except ImportError:
        return None
    return join_triton


def refusal(query: Tensor, key: Tensor) -> str | None:
    """Why this file cannot serve a call, or ``None`` if it can."""
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it is a GPU kernel and the query is on {query.device.type}"
    if any(type(tensor) is not Tensor for tensor in (query, key)):
        return "it takes plain tensors"
    if query.dtype not in DTYPES:
        return f"it has no {query.dtype}"
    return "Triton is not installed" if _triton() is None else None


def join(query: Tensor, key: Tensor, made: Join, coefficients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put lanes beside the content of both sides.

    Args:
        query: (B, H, Q, D).
        key: (B, H / G, K, D).
        made: The lanes.
        coefficients: Learned numbers in the order of the layout, each (H,) or (H, n), float32.

    Returns:
        (B, H, Q, W) and (B, H / G, K, W), tokens before heads in memory. Gradients reach the content
        and the coefficients.
    """
    return _Joined.apply(query, key, made, *coefficients)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, made: Join, *coefficients: Tensor) -> tuple[Tensor, Tensor]:
        content_width = query.shape[-1]
        num_lanes = len(made.layout.query) + (made.padding is not None)
        width = kernel_width(content_width + num_lanes, query.device)
        maps = made.layout.maps(query.device, content_width, width)
        flat = [tensor.detach().reshape(-1) for tensor in coefficients]
        weights = torch.cat(flat) if len(flat) > 1 else flat[0]
        ctx.made, ctx.maps, ctx.weights = made, maps, weights
        ctx.shapes = (content_width, [tensor.shape for tensor in coefficients])
        return _triton().launch_join(query, key, weights, maps, made, width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        made, maps, (content_width, shapes) = ctx.made, ctx.maps, ctx.shapes
        if not any(ctx.needs_input_grad[3:]):
            content = (grad_query[..., :content_width], grad_key[..., :content_width])
            return (*content, None, *(None for _ in shapes))
        query, key, grads = _triton().launch_split(grad_query, grad_key, ctx.weights, maps, made, content_width)
        sizes = [shape.numel() for shape in shapes]
        parts = grads.split(sizes)
        return (query, key, None, *(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))


def _tile_width(width: int) -> int:
    return 1 << (width - 1).bit_length()
