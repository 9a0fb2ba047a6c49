"""From a prior's expansions to the lanes of one fused call, multiplied out by a kernel.

Legend: H query heads, Hk key heads, Q queries, K keys, P lanes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from eotattn.attention.call import AttentionCall
from eotattn.attention.positions import Positions
from eotattn.kernels import join, sdpa
from eotattn.kernels.join_layout import Layout, PartShape, read_layout
from eotattn.priors.expansion import Expansion, Form
from eotattn.priors.lanes import default_terms, is_low_precision
from eotattn.priors.positions import is_plain, may_remember, run_table

__all__ = ["joined"]

#: Lanes may count positions from anywhere, and are the more exact the nearer: origins are multiples of this.
ORIGIN_STEP = 1024
#: Samples with positions of their own that are joined one by one; an estimate of where lanes from factors cost less.
MOST_SAMPLES = 8
#: Layouts remembered.
MAX_LAYOUTS = 256


def joined(call: AttentionCall) -> tuple[Tensor, Tensor] | None:
    """Query and key with the prior's lanes (and a padding lane) beside them.

    ``None`` where a kernel cannot do it and lanes come from factors: that is the definition, this is faster.
    """
    query, key, prior = call.query, call.key, call.prior
    if prior is None or (query.device.type != "cuda" and not join.INTERPRETED):
        return None
    parts = prior.expansions(query.dtype)
    if parts is None:
        return None
    coefficients = [tensor.contiguous() for part in parts for tensor in part.coefficients]
    if join.refusal(query, key, coefficients) is not None:
        return None
    if call.query_positions.on_grid or call.key_positions.on_grid:
        return None
    query_stride, key_stride = _stride(call.query_positions), _stride(call.key_positions)
    samples = query.shape[0] if query_stride or key_stride else 1
    if samples > MOST_SAMPLES or (samples > 1 and torch.compiler.is_compiling()):
        return None
    padding = call.masks.padding.contiguous() if call.masks.padding is not None and call.masks.dense is None else None
    far = sdpa.far_lane(query.dtype, scale=call.scale)
    origin = _origin(call.key_positions)
    forms = tuple([part.form for part in parts])
    if torch.compiler.is_compiling():
        sides = (("query", call.query_positions), ("key", call.key_positions))
        features = [_features(forms, side, origin, positions.tensor) for side, positions in sides]
        rest = (coefficients, *_numbers(parts, query.dtype), 1 / call.scale, padding, far)
        return join.join_in_graph(query, key, (features[0], features[1]), *rest)
    if not is_plain():
        return None
    if call.query_positions.given is not None or call.key_positions.given is not None:  # whole numbers need no check
        prior.check_positions(call.query_positions.tensor, call.key_positions.tensor)
    layout = _layout(parts, key.shape[1], query.dtype)
    query_table, query_first = _table(forms, "query", origin, call.query_positions)
    key_table, key_first = _table(forms, "key", origin, call.key_positions)
    made = join.Join(layout, query_table, key_table, query_first, key_first, 1 / call.scale, padding, far)
    if samples == 1:
        return join.join(query, key, made, coefficients)
    pairs = []
    for b in range(samples):
        own = made._replace(
            query_first=query_first + b * query_stride,
            key_first=key_first + b * key_stride,
            padding=None if padding is None else padding[b : b + 1],
        )
        pairs.append(join.join(query[b : b + 1], key[b : b + 1], own, coefficients))
    queries, keys = zip(*pairs, strict=True)
    return torch.cat(queries), torch.cat(keys)


def _stride(side: Positions) -> int:
    """Rows of the table from one sample to the next: 0 where they share their positions."""
    return side.length if side.given is not None and side.given.dim() == 2 and side.given.shape[0] > 1 else 0


def _origin(keys: Positions) -> int:
    """Where lanes count from: just before the last key, so that numbers are small in the rows that see the most keys.

    A slope times a position of 131 072 is 65 536, where one unit of an fp32 accumulator is 0.008.
    """
    return 0 if keys.first is None else (keys.first + keys.length) // ORIGIN_STEP * ORIGIN_STEP


def _table(forms: tuple[Form, ...], side: str, origin: int, positions: Positions) -> tuple[Tensor, int]:
    """Features of one side, and the row of the first token."""
    compute = partial(_features, forms, side, origin)
    first = positions.first
    if first is None or first < 0 or not may_remember(positions.device):
        return compute(positions.tensor), 0
    return run_table((side, forms, origin), first + positions.length, positions.device, compute), first


def _features(forms: Sequence[Form], side: str, origin: int, positions: Tensor) -> Tensor:
    """(L, columns) float32: what the forms need to know of the positions of one side, form by form.

    Samples with positions of their own, (B, L), lie below one another.
    """
    each: list[Tensor] = []
    positions = positions.flatten()
    for form in forms:
        at = positions - origin if form.is_relative else positions
        each.append(form.learned_features(at) if form.learned == side else form.fixed_features(at))
        if form.row_features is not None:
            row = form.row_features(at)
            each.append((row if form.learned == side else torch.ones_like(row)).unsqueeze(-1))
    return torch.cat(each, dim=-1).float()


def _shape(part: Expansion, dtype: torch.dtype) -> PartShape:
    form = part.form
    return PartShape(
        sources=form.sources,
        widths=tuple([1 if tensor.dim() == 1 else tensor.shape[1] for tensor in part.coefficients]),
        learns_query=form.learned == "query",
        terms=default_terms(dtype, one_side_is_exact=form.fixed_is_exact),
        is_exact=form.fixed_is_exact,
        by_size=form.by_size,
        has_row=form.row_features is not None,
        has_rest=form.row_features is not None and is_low_precision(dtype),
    )


_LAYOUTS: dict[Hashable, Layout] = {}


def _layout(parts: Sequence[Expansion], num_kv_heads: int, dtype: torch.dtype) -> Layout:
    """The layout of some parts, looked up by what decides it."""
    known = [(part.form, part.scale, tuple([tensor.shape for tensor in part.coefficients])) for part in parts]
    key = (num_kv_heads, dtype, *known)
    layout = _LAYOUTS.get(key)
    if layout is None:
        if len(_LAYOUTS) >= MAX_LAYOUTS:
            _LAYOUTS.clear()
        numbers, scales = _numbers(parts, dtype)
        layout = _LAYOUTS[key] = read_layout(tuple(numbers), tuple(scales), len(parts[0].scale), num_kv_heads)
    return layout


def _numbers(parts: Sequence[Expansion], dtype: torch.dtype) -> tuple[list[int], list[float]]:
    """What decides a layout, as numbers that a compiled graph can hold."""
    numbers = [number for part in parts for number in _shape(part, dtype).numbers()]
    return numbers, [factor for part in parts for factor in part.scale]
