"""How the kernels of :mod:`eotattn.kernels.join_triton` are launched.

Legend: B batch, H heads, G query heads a key head, Q queries, K keys, D content width, W kernel width.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from eotattn.kernels.join_layout import ENTRIES, MAX_TENSORS, tile_width
from eotattn.kernels.join_triton import finish_kernel, join_kernel, split_kernel

__all__ = ["launch_join", "launch_split"]

#: Tokens that one program works on at a time.
BLOCK = 32
#: Programs wanted in one launch: a few for each of the processors of a large GPU. More would only reload the maps.
PROGRAMS = 4224
#: Most programs along the tokens; in the backward pass each leaves one row of sums.
MAX_PARTS = 128
#: Launches remembered for each kernel.
MAX_READY = 1024
#: Since Triton 3.3 a compiled kernel is called with all arguments of its source.
LAUNCHES_DIRECTLY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
NONE = (None,) * MAX_TENSORS


class _Launcher:
    """A kernel whose compiled form is looked up by what the caller says decides it: sizes, strides, alignments.

    That is several times faster than Triton's own look at every argument.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._ready: dict[Hashable, Any] = {}

    def __call__(
        self, key: tuple[Hashable, ...], device: torch.device, grid: tuple[int, int, int], *arguments: Any
    ) -> None:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(key, device, grid, *arguments)
        run = self._ready.get((device, key))
        if run is not None:
            return run(*arguments)
        compiled = self._kernel[grid](*arguments)
        if isinstance(compiled, CompiledKernel) and LAUNCHES_DIRECTLY:
            if len(self._ready) >= MAX_READY:
                self._ready.clear()
            self._ready[device, key] = compiled[grid]
        return None


_join, _split, _finish = _Launcher(join_kernel), _Launcher(split_kernel), _Launcher(finish_kernel)


def launch_join(query: Tensor, key: Tensor, made: Any, coefficients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, H, Q, W) and (B, H / G, K, W): content and lanes."""
    query, key = _with_unit_stride(query), _with_unit_stride(key)
    (batch, heads, queries, content_width), (_, kv_heads, keys, _) = query.shape, key.shape
    width, layout = made.width(content_width, query.device), made.layout
    maps = layout.maps(query.device, width - content_width)
    query_out = torch.empty(batch, queries, heads, width, dtype=query.dtype, device=query.device)
    key_out = torch.empty(batch, keys, kv_heads, width, dtype=query.dtype, device=query.device)
    strides = (*query.stride()[:3], *key.stride()[:3])
    columns = (made.query_features.shape[1], made.key_features.shape[1])
    padded = made.padding is not None
    pointers = (query, key, made.padding) if made.padding is not None else (query, key)
    aligned = tuple([tensor.data_ptr() % 16 for tensor in pointers])
    place = (layout, query.dtype, content_width, batch, queries, keys, strides, aligned, columns)
    _join(
        place, query.device, (_num_parts(max(queries, keys), heads), heads, 2),
        query, key, query_out, key_out, made.query_features, made.key_features, made.query_first, made.key_first,
        *coefficients, *NONE[len(coefficients):], maps.scales, maps.query, maps.key, maps.query_wide, maps.key_wide,
        made.padding, batch, queries, keys, *strides, made.query_scale, made.far,
        heads, heads // kv_heads, content_width, tile_width(content_width), layout.num_lanes, width,
        maps.query.shape[1], *columns, *maps.num_wide, maps.query_wide.shape[-1], maps.key_wide.shape[-1], padded,
        BLOCK,
    )  # fmt: skip
    return query_out.transpose(1, 2), key_out.transpose(1, 2)


def launch_split(
    query_grad: Tensor, key_grad: Tensor, made: Any, coefficients: Sequence[Tensor], content_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the content, (B, H, Q, D) and (B, H / G, K, D), and of the coefficients, flat, tensor by tensor."""
    query_grad, key_grad = _with_unit_stride(query_grad), _with_unit_stride(key_grad)
    (batch, heads, queries, width), (_, kv_heads, keys, _) = query_grad.shape, key_grad.shape
    device, layout = query_grad.device, made.layout
    maps = layout.maps(device, width - content_width)
    tile, group, num_wide = maps.query.shape[1], heads // kv_heads, maps.num_wide
    widest = (maps.query_wide.shape[-1], maps.key_wide.shape[-1])
    parts = _num_parts(max(queries, keys), heads)
    query_out = torch.empty(batch, queries, heads, content_width, dtype=query_grad.dtype, device=device)
    key_out = torch.empty(batch, keys, kv_heads, content_width, dtype=query_grad.dtype, device=device)
    row = 2 * tile * (heads + kv_heads) + heads * (num_wide[0] * widest[0] + num_wide[1] * widest[1])
    sums = torch.empty(parts * row, device=device)
    flat = torch.empty(sum(tensor.numel() for tensor in coefficients), device=device)
    strides = (*query_grad.stride()[:3], *key_grad.stride()[:3])
    aligned = (query_grad.data_ptr() % 16, key_grad.data_ptr() % 16)
    columns = (made.query_features.shape[1], made.key_features.shape[1])
    place = (layout, query_grad.dtype, content_width, batch, queries, keys, strides, aligned, columns)
    _split(
        place, device, (parts, heads, 2),
        query_grad, key_grad, query_out, key_out, sums, made.query_features, made.key_features, made.query_first,
        made.key_first, maps.query, maps.key, maps.query_wide, maps.key_wide, batch, queries, keys, *strides,
        made.query_scale, heads, group, content_width, tile_width(content_width), width, tile,
        *columns, *num_wide, tile_width(max(1, num_wide[0], num_wide[1] * group)), *widest, BLOCK,
    )  # fmt: skip
    _finish(
        (layout, parts, tile), device, (maps.owners.shape[0], heads, 1),
        sums, flat, *coefficients, *NONE[len(coefficients):], maps.scales, maps.owners, parts,
        heads, group, tile, *num_wide, *widest, ENTRIES, tile_width(parts),
    )  # fmt: skip
    return query_out.transpose(1, 2), key_out.transpose(1, 2), flat


def _num_parts(length: int, heads: int) -> int:
    """Programs along the tokens."""
    return min(MAX_PARTS, -(-length // BLOCK), max(1, PROGRAMS // (2 * heads)))


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
