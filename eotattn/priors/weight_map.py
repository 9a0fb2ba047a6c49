"""From learned numbers to the matrices of both sides of a lane plan: one linear map, and one back.

Legend: H heads, Hk key heads, N numbers of a head, T = H N numbers, R rows (H or Hk), J entries of a row's matrices.

Weights are linear in what is learned, so all matrices of a call are one product with a constant, and the gradients of
all parameters one product with its transpose, whatever the number of priors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eotattn.compat import admitted, is_intercepted, map_tensors, plain_tensors
from eotattn.priors.lane_sides import SidePlan

__all__ = ["Block", "Learned", "WeightMap", "map_weights", "weight_map"]


class Learned(NamedTuple):
    """What is known of the learned numbers of one term.

    Args:
        widths: Numbers n of each of its tensors, (H,) or (H, n).
        units: H constants that they are times, or ``None``.
    """

    widths: tuple[int, ...]
    units: tuple[float, ...] | None


class Block(NamedTuple):
    """One product: (R, K) numbers times (K, J), the matrices of one side or of both beside each other.

    Args:
        start: (1 or R, J) float64, what is in the matrices besides.
        values: (K, J) float64, how numbers enter them.
        gradients: (K, J) float64, how their gradients do: also where constants of each row have no value.
        back: (T,) int64: where in (R, K) each learned number is, tensor after tensor.
        sources: (S, J) int64: the numbers that each entry is a sum of, at most S of them.
        factors: (S, J) float64: times what.
    """

    start: Tensor
    values: Tensor
    gradients: Tensor
    back: Tensor
    sources: Tensor
    factors: Tensor


class WeightMap(NamedTuple):
    """The map of one plan, on a device.

    Args:
        units: (H, N) float64, the constants that numbers are times.
        units_back: (T,) float64, the same, tensor after tensor.
        blocks: At most two, query before key.
        query: (1 or H, C, P) the query's matrix if nothing is learned on that side, else ``None``.
        key: The same of the key.
        pieces: (P,) int8 of either side.
        in_graph: Whether a graph takes it as inputs.
    """

    units: Any
    units_back: Any
    blocks: Any
    query: Any
    key: Any
    pieces: Any
    in_graph: bool = False


def weight_map(
    sides: tuple[SidePlan, SidePlan],
    learned: tuple[Learned, ...],
    heads: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    in_graph: bool,
) -> WeightMap:
    """The map to the matrices, in ``dtype``, of the sides of a plan for H and Hk heads, query before key."""
    made = _weight_map(sides, learned, heads)
    placed: WeightMap = map_tensors(lambda x: admitted(x).to(device) if isinstance(x, Tensor) else x, made)
    query, key = (None if one is None else one.to(dtype) for one in (placed.query, placed.key))
    return placed._replace(query=query, key=key, in_graph=in_graph)


@lru_cache(maxsize=512)
@plain_tensors()
def _weight_map(sides: tuple[SidePlan, SidePlan], learned: tuple[Learned, ...], heads: tuple[int, int]) -> WeightMap:
    num_heads, _ = heads
    units = torch.ones(num_heads, sum(sum(one.widths) for one in learned), dtype=torch.float64)
    order = torch.arange(units.numel()).view(units.shape)
    back, first = [order.flatten()[:0]], 0
    for one in learned:
        if one.units is not None:
            units[:, first : first + sum(one.widths)] = torch.tensor(one.units, dtype=torch.float64).unsqueeze(-1)
        for width in one.widths:
            back.append(order[:, first : first + width].flatten())
            first += width
    places = torch.cat(back)
    learning = [side for side in sides if side.selection is not None]
    together = [learning] if heads[0] == heads[1] and learning else [[side] for side in learning]
    query, key = (None if side.selection is not None else side.fixed for side in sides)
    blocks = tuple([_block(one, places) for one in together])
    return WeightMap(units, units.flatten()[places], blocks, query, key, (sides[0].piece, sides[1].piece))


def _block(sides: Sequence[SidePlan], back: Tensor) -> Block:
    selections = [side.selection for side in sides if side.selection is not None]
    gradients = values = torch.cat(selections, dim=1)
    if any(side.constant is not None for side in sides):
        kept = [s if side.constant is None else s - side.constant for s, side in zip(selections, sides, strict=True)]
        values = torch.cat(kept, dim=1)
    rows = max(side.fixed.shape[0] for side in sides)
    most = max(1, int((values != 0).sum(0).max()))
    sources = values.abs().argsort(dim=0, descending=True, stable=True)[:most]
    return Block(
        start=torch.cat([side.fixed.flatten(1).expand(rows, -1) for side in sides], dim=1),
        values=values,
        gradients=gradients,
        back=back,
        sources=sources,
        factors=values.gather(0, sources),
    )


def map_weights(
    held: WeightMap, shapes: tuple[torch.Size, torch.Size], dtype: torch.dtype, numbers: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The matrices (1 or H, C, P) and (1 or Hk, C, P) of both sides.

    Args:
        held: The map.
        shapes: Of the matrices of a head, (..., C, P).
        dtype: Of the matrices.
        numbers: Learned numbers, (H,) or (H, n).
    """
    query, key = held.query, held.key
    if not held.blocks:
        return query, key
    learning = shapes if query is None and key is None else shapes[:1] if query is None else shapes[1:]
    if not torch.is_grad_enabled():
        made = _matrices(held, learning, dtype, numbers)
    elif held.in_graph or (held.units.is_cuda and not is_intercepted()):  # where operations are launches
        made = _Product.apply(held, learning, dtype, *numbers)
    else:
        made = _matrices(held, learning, dtype, numbers, differentiably=True)
    if len(made) == 2:
        return made
    return (made[0], key) if query is None else (query, made[0])


def _matrices(
    held: WeightMap,
    shapes: Sequence[torch.Size],
    dtype: torch.dtype,
    numbers: Sequence[Tensor],
    *,
    differentiably: bool = False,
) -> tuple[Tensor, ...]:
    """The matrices of the sides that learn, shaped (..., C, P); to any order, in any transform if asked to."""
    each: list[Tensor] = []
    for one in numbers:
        each.append(one if one.dim() == 2 else one.unsqueeze(-1))  # noqa: PERF401  # a comprehension is a call
    learned = (each[0] if len(each) == 1 else torch.cat(each, dim=1)) * held.units
    products = []
    for block in held.blocks:
        rows = learned.view(-1, block.values.shape[0])
        if differentiably and block.gradients is not block.values:
            product = torch.addmm(block.start, rows.detach(), block.values)
            products.append(torch.addmm(product, rows - rows.detach(), block.gradients))
        elif held.in_graph:  # elementwise, which compilers fuse with what is around it
            entries = [rows[:, at] * by for at, by in zip(block.sources, block.factors, strict=True)]
            products.append(sum(entries, start=block.start))
        else:
            products.append(torch.addmm(block.start, rows, block.values))
    if len(products) < len(shapes):
        first = shapes[0][1] * shapes[0][2]
        products = [products[0][:, :first], products[0][:, first:]]
    made: tuple[Tensor, ...] = ()
    for product, shape in zip(products, shapes, strict=True):
        made += (product.view(product.shape[0], shape[1], shape[2]).to(dtype),)
    return made


class _Product(torch.autograd.Function):
    """All matrices of a call; gradients come back as one tensor, of which each parameter's is a stretch."""

    @staticmethod
    def forward(ctx: Any, held: WeightMap, shapes: Any, dtype: torch.dtype, *numbers: Tensor) -> tuple[Tensor, ...]:
        ctx.held, ctx.kinds = held, [(one.shape, one.dtype) for one in numbers]
        return _matrices(held, shapes, dtype, numbers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        blocks, flat = ctx.held.blocks, None
        for n, block in enumerate(blocks):
            own = [grad.flatten(1) for grad in (grads if len(blocks) == 1 else grads[n : n + 1])]
            grad = (own[0] if len(own) == 1 else torch.cat(own, dim=1)).double()
            if ctx.held.in_graph:
                row, entry = block.back // block.values.shape[0], block.back % block.values.shape[0]
                part = (grad[row] * block.gradients[entry]).sum(-1)
            else:
                part = (grad @ block.gradients.mT).flatten()[block.back]
            flat = part if flat is None else flat + part
        assert flat is not None
        flat, kinds = flat * ctx.held.units_back, {dtype for _, dtype in ctx.kinds}
        flat = flat.to(kinds.pop()) if len(kinds) == 1 else flat
        parts = flat.split([shape.numel() for shape, _ in ctx.kinds])
        back = [part.view(shape).to(dtype) for part, (shape, dtype) in zip(parts, ctx.kinds, strict=True)]
        return (None, None, None, *back)
