"""The Triton kernels of :mod:`eotattn.kernels.join`: put lanes beside content, and take their gradients apart.

Legend: B batch, H heads of a side, L tokens, D content width, W kernel width, C feature columns; DP, WP tiles
of the content's and the lanes' columns, NW wide factors, CQ and CK feature columns of a side.

Both sides go in one launch, since launches are what costs at usual sizes. Tensors hold tokens before heads, as
projections make them, so that what goes into the attention kernel and what comes out of it is never copied. The maps
are described in :mod:`eotattn.kernels.join_layout`.
"""

# mypy: allow-untyped-defs
# ruff: noqa: ANN001, ANN201, ANN202, N803 - the language of these kernels has types of its own

from __future__ import annotations

import triton
import triton.language as tl

from eotattn.kernels.join_layout import MAX_TENSORS

__all__ = ["finish_kernel", "join_kernel", "split_kernel"]

COEFFICIENTS = [f"c{n}" for n in range(MAX_TENSORS)]


@triton.jit
def _coefficients(c0, c1, c2, c3, c4, c5, c6, c7, tensor, at):
    """Entry ``at`` of coefficient tensor number ``tensor``, one where that is negative; the spare ones are None."""
    value = tl.where(tensor < 0, 1.0, tl.load(c0 + at, mask=tensor == 0, other=0.0))
    if c1 is not None:
        value += tl.load(c1 + at, mask=tensor == 1, other=0.0)
    if c2 is not None:
        value += tl.load(c2 + at, mask=tensor == 2, other=0.0)
    if c3 is not None:
        value += tl.load(c3 + at, mask=tensor == 3, other=0.0)
    if c4 is not None:
        value += tl.load(c4 + at, mask=tensor == 4, other=0.0)
    if c5 is not None:
        value += tl.load(c5 + at, mask=tensor == 5, other=0.0)
    if c6 is not None:
        value += tl.load(c6 + at, mask=tensor == 6, other=0.0)
    if c7 is not None:
        value += tl.load(c7 + at, mask=tensor == 7, other=0.0)
    return value


@triton.jit
def _weights_at(c0, c1, c2, c3, c4, c5, c6, c7, scales, slot, step, owner, H: tl.constexpr):
    """Effective coefficients of head ``owner``, read as the slots at ``slot`` say; one where nothing is learned."""
    tensor, column, stride = tl.load(slot + step), tl.load(slot + 2 * step), tl.load(slot + 3 * step)
    row, by_size = tl.load(slot + 4 * step), tl.load(slot + 5 * step)
    weight = _coefficients(c0, c1, c2, c3, c4, c5, c6, c7, tensor, column + owner * stride)
    scale = tl.load(scales + row * H + owner, mask=tensor >= 0, other=1.0)
    return tl.where(by_size == 1, tl.abs(weight), weight) * scale


@triton.jit
def _join_side(
    content, out, features, c0, c1, c2, c3, c4, c5, c6, c7, scales, maps, wide, padding, batch, length, stride_b,
    stride_h, stride_l, num_features, lane_scale, far, head, heads,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
    WP: tl.constexpr, NW: tl.constexpr, WIDEST: tl.constexpr, IS_KEY: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write content and lanes of one head and one block of tokens, for every sample."""
    cols, slots = tl.arange(0, WP), tl.arange(0, WIDEST)
    member, which = tl.load(maps + WP + cols), tl.load(maps + 3 * WP + cols)
    term, learned = tl.load(maps + cols)[None, :], tl.load(maps + 2 * WP + cols) == 1
    owner = head * GROUP + tl.maximum(member, 0) if IS_KEY else head + 0 * member
    first = maps + 4 * WP + cols
    second = first + 6 * WP
    first_column, second_column = tl.load(first), tl.load(second)
    first_weight = _weights_at(c0, c1, c2, c3, c4, c5, c6, c7, scales, first, WP, owner, H)
    second_weight = _weights_at(c0, c1, c2, c3, c4, c5, c6, c7, scales, second, WP, owner, H)
    factor_scale = tl.where(learned, lane_scale, 1.0)
    if not IS_KEY:
        factor_scale = tl.where((member < 0) | (member == head % GROUP), factor_scale, 0.0)
    columns = tl.arange(0, DP)
    kind = out.dtype.element_ty
    lift = 1.0
    if PADDED and kind == tl.float16:  # which holds no number that outweighs every log-prior, but the product of two
        lift = tl.minimum(1e7 * lane_scale / (0.0 - far), 0.0 - far)
    for start in range(tl.program_id(0) * BLOCK, length, tl.num_programs(0) * BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = (rows < length)[:, None]
        source = features + rows[:, None] * num_features
        feature = tl.load(source + first_column[None, :], mask=inside & (first_column >= 0)[None, :], other=0.0)
        value = first_weight[None, :] * feature
        feature = tl.load(source + second_column[None, :], mask=inside & (second_column >= 0)[None, :], other=0.0)
        value += second_weight[None, :] * feature
        for w in tl.static_range(NW):
            slot = wide + 6 * w * WIDEST + slots
            column = tl.load(slot)
            feature = tl.load(source + column[None, :], mask=inside & (column >= 0)[None, :], other=0.0)
            for g in tl.static_range(GROUP if IS_KEY else 1):
                mine_head = head * GROUP + g if IS_KEY else head
                weight = _weights_at(c0, c1, c2, c3, c4, c5, c6, c7, scales, slot, WIDEST, mine_head, H)
                factor = tl.sum(feature * weight[None, :], axis=1)
                mine = (which == w) & (member == g) if IS_KEY else which == w
                value = tl.where(mine[None, :], factor[:, None], value)
        value *= factor_scale[None, :]
        leading = value.to(kind).to(tl.float32)
        rest = (value - leading).to(kind).to(tl.float32)
        value = tl.where(term == 0, leading, tl.where(term == 1, rest, value - leading - rest))
        value = tl.where(term < 0, 0.0, value)
        tokens = rows[:, None].to(tl.int64)
        taken = content + head * stride_h + tokens * stride_l + columns[None, :]
        target = out + (tokens * heads + head) * W
        has_content = inside & (columns < D)[None, :]
        has_lane = inside & (cols < W - D)[None, :]
        for b in range(batch):
            tl.store(target + columns[None, :], tl.load(taken, mask=has_content), mask=has_content)
            entry = value
            if PADDED:
                if IS_KEY:
                    is_padding = tl.load(padding + b * length + rows, mask=rows < length, other=0) != 0
                    entry = tl.where((cols == P)[None, :], tl.where(is_padding, far, 0.0)[:, None], entry)
                else:
                    entry = tl.where((cols == P)[None, :], lift, entry)
            tl.store(target + D + cols[None, :], entry.to(kind), mask=has_lane)
            taken += stride_b
            target += length * heads * W


@triton.jit(do_not_specialize=["query_first", "key_first"], do_not_specialize_on_alignment=COEFFICIENTS)
def join_kernel(
    query, key, query_out, key_out, query_features, key_features, query_first, key_first, c0, c1, c2, c3, c4, c5, c6,
    c7, scales, query_maps, key_maps, query_wide, key_wide, padding, batch, queries, keys, query_stride_b,
    query_stride_h, query_stride_l, key_stride_b, key_stride_h, key_stride_l, lane_scale, far,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
    WP: tl.constexpr, CQ: tl.constexpr, CK: tl.constexpr, NWQ: tl.constexpr, NWK: tl.constexpr,
    WIDEST_Q: tl.constexpr, WIDEST_K: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Content and lanes of both sides: one program a head, a side and some blocks of tokens."""
    head = tl.program_id(1)
    if tl.program_id(2) == 0:
        _join_side(
            query, query_out, query_features + query_first * CQ, c0, c1, c2, c3, c4, c5, c6, c7, scales, query_maps,
            query_wide, padding, batch, queries, query_stride_b, query_stride_h, query_stride_l, CQ, lane_scale, far,
            head, H, H, GROUP, D, DP, P, W, WP, NWQ, WIDEST_Q, False, PADDED, BLOCK,
        )  # fmt: skip
    elif head < H // GROUP:
        _join_side(
            key, key_out, key_features + key_first * CK, c0, c1, c2, c3, c4, c5, c6, c7, scales, key_maps,
            key_wide, padding, batch, keys, key_stride_b, key_stride_h, key_stride_l, CK, lane_scale, far,
            head, H // GROUP, H, GROUP, D, DP, P, W, WP, NWK, WIDEST_K, True, PADDED, BLOCK,
        )  # fmt: skip


@triton.jit
def _split_side(
    grad, out, sums, wide_sums, features, maps, wide, batch, length, stride_b, stride_h, stride_l, num_features,
    lane_scale, head, heads,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, NW: tl.constexpr,
    NW_TILE: tl.constexpr, WIDEST: tl.constexpr, IS_KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the content's gradient out, and sum the lanes' over samples and this program's tokens."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    cols, slots, columns = tl.arange(0, WP), tl.arange(0, WIDEST), tl.arange(0, DP)
    member, which = tl.load(maps + WP + cols), tl.load(maps + 3 * WP + cols)
    wanted = (tl.load(maps + cols) <= 0) & (tl.load(maps + 2 * WP + cols) == 1)
    if not IS_KEY:
        wanted = wanted & ((member < 0) | (member == head % GROUP))
    first_column, second_column = tl.load(maps + 4 * WP + cols), tl.load(maps + 10 * WP + cols)
    first_sum, second_sum = tl.zeros([WP], tl.float32), tl.zeros([WP], tl.float32)
    members: tl.constexpr = GROUP if IS_KEY else 1
    factors = tl.arange(0, NW_TILE)[:, None]
    wide_sum = tl.zeros([NW_TILE, WIDEST], tl.float32)
    for start in range(part * BLOCK, length, parts * BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = (rows < length)[:, None]
        total = tl.zeros([BLOCK, WP], tl.float32)
        taken = grad + head * stride_h + rows[:, None].to(tl.int64) * stride_l
        target = out + (rows[:, None].to(tl.int64) * heads + head) * D + columns[None, :]
        has_content = inside & (columns < D)[None, :]
        has_lane = inside & (cols < W - D)[None, :]
        for _ in range(batch):
            tl.store(target, tl.load(taken + columns[None, :], mask=has_content), mask=has_content)
            total += tl.load(taken + D + cols[None, :], mask=has_lane, other=0.0).to(tl.float32)
            taken += stride_b
            target += length * heads * D
        source = features + rows[:, None] * num_features
        total = tl.where(wanted[None, :], total * lane_scale, 0.0)
        feature = tl.load(source + first_column[None, :], mask=inside & (first_column >= 0)[None, :], other=0.0)
        first_sum += tl.sum(total * feature, axis=0)
        feature = tl.load(source + second_column[None, :], mask=inside & (second_column >= 0)[None, :], other=0.0)
        second_sum += tl.sum(total * feature, axis=0)
        for w in tl.static_range(NW):
            column = tl.load(wide + 6 * w * WIDEST + slots)
            feature = tl.load(source + column[None, :], mask=inside & (column >= 0)[None, :], other=0.0)
            for g in tl.static_range(members):
                mine = (which == w) & (member == g) if IS_KEY else which == w
                row = tl.sum(tl.where(mine[None, :], total, 0.0), axis=1)
                found = tl.sum(feature * row[:, None], axis=0)
                wide_sum += tl.where(factors == w * members + g, found[None, :], 0.0)
    store = sums + (part * heads + head) * 2 * WP + cols
    tl.store(store, first_sum)
    tl.store(store + WP, second_sum)
    store = wide_sums + ((part * heads + head) * NW * members + factors) * WIDEST + slots[None, :]
    tl.store(store, wide_sum, mask=(factors < NW * members) & (slots >= 0)[None, :])


@triton.jit
def _sums_at(
    sums, parts, H: tl.constexpr, GROUP: tl.constexpr, WP: tl.constexpr, NWQ: tl.constexpr, WIDEST_Q: tl.constexpr
):
    """Where the four kinds of sums begin: of query and key lanes, and of the slots of wide factors."""
    key_sums = sums + parts * (H * 2 * WP)
    query_wide_sums = key_sums + parts * (H // GROUP * 2 * WP)
    return sums, key_sums, query_wide_sums, query_wide_sums + parts * (H * NWQ * WIDEST_Q)


@triton.jit(do_not_specialize=["query_first", "key_first"])
def split_kernel(
    query_grad, key_grad, query_out, key_out, sums, query_features, key_features, query_first, key_first, query_maps,
    key_maps, query_wide, key_wide, batch, queries, keys,
    query_stride_b, query_stride_h, query_stride_l, key_stride_b, key_stride_h, key_stride_l, lane_scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    CQ: tl.constexpr, CK: tl.constexpr, NWQ: tl.constexpr, NWK: tl.constexpr, NW_TILE: tl.constexpr,
    WIDEST_Q: tl.constexpr, WIDEST_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the content of both sides, and this program's share of those of the coefficients."""
    head = tl.program_id(1)
    query_sums, key_sums, query_wide_sums, key_wide_sums = _sums_at(
        sums, tl.num_programs(0), H, GROUP, WP, NWQ, WIDEST_Q
    )
    if tl.program_id(2) == 0:
        _split_side(
            query_grad, query_out, query_sums, query_wide_sums, query_features + query_first * CQ, query_maps,
            query_wide, batch, queries, query_stride_b, query_stride_h, query_stride_l, CQ, lane_scale, head, H,
            GROUP, D, DP, W, WP, NWQ, NW_TILE, WIDEST_Q, False, BLOCK,
        )  # fmt: skip
    elif head < H // GROUP:
        _split_side(
            key_grad, key_out, key_sums, key_wide_sums, key_features + key_first * CK, key_maps,
            key_wide, batch, keys, key_stride_b, key_stride_h, key_stride_l, CK, lane_scale, head, H // GROUP,
            GROUP, D, DP, W, WP, NWK, NW_TILE, WIDEST_K, True, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=COEFFICIENTS)
def finish_kernel(
    sums, out, c0, c1, c2, c3, c4, c5, c6, c7, scales, owners, parts,
    H: tl.constexpr, GROUP: tl.constexpr, WP: tl.constexpr, NWQ: tl.constexpr, NWK: tl.constexpr,
    WIDEST_Q: tl.constexpr, WIDEST_K: tl.constexpr, ENTRIES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradient of one coefficient of one head: the sum over all programs and over the lanes that it feeds."""
    head = tl.program_id(1)
    query_sums, key_sums, query_wide_sums, key_wide_sums = _sums_at(sums, parts, H, GROUP, WP, NWQ, WIDEST_Q)
    owners += tl.program_id(0) * (8 + ENTRIES)
    side, wide, tensor, column = tl.load(owners), tl.load(owners + 1), tl.load(owners + 2), tl.load(owners + 3)
    stride, row, by_size = tl.load(owners + 4), tl.load(owners + 5), tl.load(owners + 6)
    place = tl.load(owners + 7) + head * stride
    entries, at = tl.arange(0, ENTRIES), tl.arange(0, PARTS)[:, None]
    where = tl.load(owners + 8 + entries)[None, :]
    there = (at < parts) & (entries == 0)[None, :]
    if wide < 0:
        there = (at < parts) & (entries < tl.load(owners + 8 + ENTRIES - 1))[None, :]
        if side == 0:
            found = tl.load(query_sums + (at * H + head) * 2 * WP + where, mask=there, other=0.0)
        else:
            found = tl.load(key_sums + (at * (H // GROUP) + head // GROUP) * 2 * WP + where, mask=there, other=0.0)
    else:
        if side == 0:
            source = query_wide_sums + ((at * H + head) * NWQ + wide) * WIDEST_Q + where
        else:
            source = (at * (H // GROUP) + head // GROUP) * NWK + wide
            source = key_wide_sums + (source * GROUP + head % GROUP) * WIDEST_K + where
        found = tl.load(source, mask=there, other=0.0)
    value = tl.sum(tl.sum(found, axis=1), axis=0) * tl.load(scales + row * H + head)
    weight = _coefficients(c0, c1, c2, c3, c4, c5, c6, c7, tensor, column + head * stride)
    tl.store(out + place, tl.where((by_size == 1) & (weight < 0), -value, value))
