"""How the kernels of :mod:`eotattn.kernels.append_triton` are launched.

Legend: B batch, H heads of a side, L tokens, D content width, W kernel width, C columns of a table, P lanes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from eotattn.kernels.append_triton import append_kernel, split_kernel

__all__ = ["launch_append", "launch_split"]

#: Tokens that one program works on at a time, and columns of a table that it sums.
BLOCK, COLUMNS = 32, 16
#: Programs wanted in one launch: a few for each of the processors of a large GPU.
PROGRAMS = 4224
#: Most programs along tokens and samples; in the backward pass each leaves its sums.
MAX_PARTS = 128
#: Launches remembered for each kernel.
MAX_READY = 1024
#: Since Triton 3.3 a compiled kernel is called with all arguments of its source.
LAUNCHES_DIRECTLY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


class _Launcher:
    """A kernel whose compiled form is looked up by what decides it: sizes, strides, alignments, the grid.

    That is several times faster than Triton's own look at every argument.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._ready: dict[Hashable, Any] = {}

    def __call__(
        self,
        device: torch.device,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor | None],
        sizes: tuple[int, ...],
        constants: tuple[int, ...],
    ) -> None:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(device, grid, tensors, sizes, constants)
        kinds = tuple([None if one is None else (one.dtype, one.data_ptr() % 16 == 0) for one in tensors])
        key = (device, grid, kinds, sizes, constants)
        run = self._ready.get(key)
        if run is not None:
            return run(*tensors, *sizes, *constants)
        compiled = self._kernel[grid](*tensors, *sizes, *constants)
        if isinstance(compiled, CompiledKernel) and LAUNCHES_DIRECTLY:
            if len(self._ready) >= MAX_READY:
                self._ready.clear()
            self._ready[key] = compiled[grid]
        return None


_append, _split = _Launcher(append_kernel), _Launcher(split_kernel)
_NOTHING: tuple[Tensor | None, ...] = (None,) * 7


def launch_append(
    contents: Sequence[Tensor], sides: Sequence[Any], fars: Sequence[Tensor | None], width: int
) -> list[Tensor]:
    """(B, H, L, W) of every side: content and lanes. One side or two, see :func:`eotattn.kernels.append.append`."""
    batch, num_heads, _, content_width = contents[0].shape
    tensors: list[Tensor | None] = []
    sizes: list[int] = [batch]
    constants: list[int] = []
    outs = []
    for content, side, far in zip(contents, sides, fars, strict=True):
        content = _with_unit_stride(content)
        heads, length = content.shape[1:3]
        out = torch.empty(batch, length, heads, width, dtype=content.dtype, device=content.device)
        table, table_b, columns, lanes = _table(side)
        more = None if side is None or side.more is None else _with_unit_stride(side.more)
        num_more = 0 if more is None else more.shape[-1]
        matrix, piece = (None, None) if side is None else (side.matrix.contiguous(), side.piece)
        tensors += [content, out, table, matrix, piece, more, far]
        sizes += [length, *content.stride()[:3], table_b]
        for one in (more, far):
            sizes += [0, 0, 0] if one is None else one.expand(batch, heads, length, -1).stride()[:3]
        per_head = matrix is not None and matrix.shape[0] > 1
        constants += [heads, columns, lanes, num_more, int(per_head), int(table_b > 0)]
        outs.append(out)
    if len(contents) == 1:
        tensors, sizes, constants = [*tensors, *_NOTHING], [*sizes, *(0,) * 11], [*constants, *(0,) * 6]
    token_parts, parts = _parts(max(content.shape[2] for content in contents), batch, num_heads)
    constants += [content_width, _tile(content_width), width, _tile(width - content_width), token_parts, BLOCK]
    _append(contents[0].device, (parts, num_heads, len(contents)), tensors, tuple(sizes), tuple(constants))
    return [out.transpose(1, 2) for out in outs]


def launch_split(
    grads: Sequence[Tensor], sides: Sequence[Any], learns: Sequence[bool], content_width: int
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients of the contents, (B, H, L, D), and of those matrices that learn, (1 or H, C, P)."""
    batch, num_heads, _, width = grads[0].shape
    device = grads[0].device
    tensors: list[Tensor | None] = []
    sizes: list[int] = [batch]
    constants: list[int] = []
    outs, counts = [], []
    for grad, side, learn in zip(grads, sides, learns, strict=True):
        grad = _with_unit_stride(grad)
        heads, length = grad.shape[1:3]
        out = torch.empty(batch, length, heads, content_width, dtype=grad.dtype, device=device)
        table, table_b, columns, lanes = _table(side)
        tensors += [grad, out, table, None if side is None else side.piece]
        sizes += [length, *grad.stride()[:3], table_b]
        constants += [heads, columns, lanes, int(table_b > 0), int(learn)]
        counts.append(heads * columns * lanes if learn else 0)
        outs.append(out)
    if len(grads) == 1:
        tensors, sizes, constants = [*tensors, *_NOTHING[:4]], [*sizes, *(0,) * 5], [*constants, *(0,) * 5]
    token_parts, parts = _parts(max(grad.shape[2] for grad in grads), batch, num_heads)
    sums = torch.empty(parts, sum(counts), device=device)
    blocks = max([-(-side.table.shape[-1] // COLUMNS) for side, learn in zip(sides, learns, strict=True) if learn])
    lane_tile = _tile(width - content_width)
    constants += [content_width, _tile(content_width), lane_tile, COLUMNS, token_parts, BLOCK]
    _split(device, (parts, num_heads, 2 * blocks), [*tensors, sums], tuple(sizes), tuple(constants))
    found = sums.sum(0).split(counts)
    matrices = [
        _as_matrix(own, side, grad.shape[1]) if learn else None
        for own, side, grad, learn in zip(found, sides, grads, learns, strict=True)
    ]
    return [out.transpose(1, 2) for out in outs], matrices


def _as_matrix(flat: Tensor, side: Any, heads: int) -> Tensor:
    """(1 or H, C, P) from the sums of every head."""
    by_head = flat.view(heads, *side.matrix.shape[1:])
    return by_head if side.matrix.shape[0] == heads else by_head.sum(0, keepdim=True)


def _table(side: Any) -> tuple[Tensor | None, int, int, int]:
    """A table whose rows follow each other, its stride from sample to sample, columns C and lanes P."""
    if side is None:
        return None, 0, 0, 0
    table, (_, columns, lanes) = side.table, side.matrix.shape
    if table.stride(-1) != 1 or table.stride(-2) != columns:
        table = table.contiguous()
    return table, table.stride(0) if table.dim() == 3 and table.shape[0] > 1 else 0, columns, lanes


def _parts(length: int, batch: int, heads: int) -> tuple[int, int]:
    """Programs along the tokens, and along tokens and samples: samples share lanes, so they part last."""
    wanted = max(1, min(MAX_PARTS, PROGRAMS // (2 * heads)))
    tokens = min(wanted, -(-length // BLOCK))
    return tokens, tokens * min(batch, max(1, wanted // tokens))


def _tile(width: int) -> int:
    """The power of two, 16 at least, that holds ``width`` columns."""
    return max(16, 1 << (width - 1).bit_length()) if width > 0 else 16


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
