"""The Triton kernels of :mod:`eotattn.kernels.append`: put lanes beside content, and take their gradients apart.

Legend: B batch, H heads of a side, L tokens, D content width, W kernel width, C columns of a table, P lanes, M further
lanes; DP, PP, CT tiles of the content's columns, of the lanes and of the table's columns.

Both sides go in one launch, since launches are what costs at usual sizes. Tensors hold tokens before heads, as
projections make them, so that what goes into the attention kernel and what comes out of it is never copied.
"""

# mypy: allow-untyped-defs
# ruff: noqa: ANN001, ANN201, ANN202, N803, SIM102 - the language of these kernels has types of its own

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["append_kernel", "split_kernel"]

_ANY_ALIGNMENT = [f"{side}_{what}" for side in ("query", "key") for what in ("table", "matrix", "piece", "more", "far")]
_ANY_SIZE = ["batch", "queries", "keys"]
_ANY_SIZE += [f"{side}_{what}" for side in ("query", "key") for what in ("table_b", "more_b", "more_h", "more_l")]
_ANY_SIZE += [f"{side}_{what}" for side in ("query", "key") for what in ("far_b", "far_h", "far_l")]


@triton.jit
def _product(
    out, table, matrix, piece, rows, length, C: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, BLOCK: tl.constexpr
):
    """(BLOCK, PP): pieces of (table @ matrix) in the digits of ``out``; all columns are summed in the same order."""
    cols = tl.arange(0, PP)
    kind = out.dtype.element_ty
    value = tl.zeros([BLOCK, PP], tl.float32)
    for c in range(C):
        feature = tl.load(table + rows.to(tl.int64) * C + c, mask=rows < length, other=0.0)
        value += feature[:, None] * tl.load(matrix + c * P + cols, mask=cols < P, other=0.0)[None, :]
    number = tl.load(piece + cols, mask=cols < P, other=0)[None, :]
    leading = value.to(kind).to(tl.float32)
    second = (value - leading).to(kind).to(tl.float32)
    return tl.where(number == 0, leading, tl.where(number == 1, second, value - leading - second))


@triton.jit
def _append_side(
    content, out, table, matrix, piece, more, far, batch, length, stride_b, stride_h, stride_l, table_b, more_b, more_h,
    more_l, far_b, far_h, far_l, head,
    H: tl.constexpr, C: tl.constexpr, P: tl.constexpr, M: tl.constexpr, PER_HEAD: tl.constexpr,
    PER_SAMPLE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, PP: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write content and lanes of one head, for some blocks of tokens and some samples."""
    cols, columns = tl.arange(0, PP), tl.arange(0, DP)
    sample, samples = tl.program_id(0) // PARTS, tl.num_programs(0) // PARTS
    if PER_HEAD:
        matrix += head * C * P
    for start in range(tl.program_id(0) % PARTS * BLOCK, length, PARTS * BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside, tokens = (rows < length)[:, None], rows[:, None].to(tl.int64)
        has_content, has_lane = inside & (columns < D)[None, :], inside & (cols < W - D)[None, :]
        value = tl.zeros([BLOCK, PP], tl.float32)
        if P > 0 and not PER_SAMPLE:
            value = _product(out, table, matrix, piece, rows, length, C, P, PP, BLOCK)
        for number in range(sample, batch, samples):
            b = tl.full([], 0, tl.int64) + number
            if P > 0 and PER_SAMPLE:
                value = _product(out, table + b * table_b, matrix, piece, rows, length, C, P, PP, BLOCK)
            source = content + b * stride_b + head * stride_h + tokens * stride_l + columns[None, :]
            target = out + ((b * length + tokens) * H + head) * W
            tl.store(target + columns[None, :], tl.load(source, mask=has_content), mask=has_content)
            entry = value
            if M > 0:
                place = more + b * more_b + head * more_h + tokens * more_l + (cols - P)[None, :]
                is_more = inside & ((cols >= P) & (cols < P + M))[None, :]
                entry += tl.load(place, mask=is_more, other=0.0).to(tl.float32)
            if far is not None:
                place = far + b * far_b + head * far_h + tokens * far_l
                is_far = inside & (cols == P + M)[None, :]
                entry = tl.where(is_far, tl.load(place, mask=inside, other=0.0).to(tl.float32), entry)
            tl.store(target + D + cols[None, :], entry.to(out.dtype.element_ty), mask=has_lane)


@triton.jit(do_not_specialize=_ANY_SIZE, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def append_kernel(
    query, query_out, query_table, query_matrix, query_piece, query_more, query_far,
    key, key_out, key_table, key_matrix, key_piece, key_more, key_far, batch,
    queries, query_b, query_h, query_l, query_table_b, query_more_b, query_more_h, query_more_l, query_far_b,
    query_far_h, query_far_l,
    keys, key_b, key_h, key_l, key_table_b, key_more_b, key_more_h, key_more_l, key_far_b, key_far_h, key_far_l,
    HQ: tl.constexpr, CQ: tl.constexpr, PQ: tl.constexpr, MQ: tl.constexpr, HEADS_Q: tl.constexpr,
    SAMPLES_Q: tl.constexpr, HK: tl.constexpr, CK: tl.constexpr, PK: tl.constexpr, MK: tl.constexpr,
    HEADS_K: tl.constexpr, SAMPLES_K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr,
    PP: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Content and lanes of both sides, or of queries alone: one program a head, a side and some tokens and samples."""
    head = tl.program_id(1).to(tl.int64)
    if tl.program_id(2) == 0:
        _append_side(
            query, query_out, query_table, query_matrix, query_piece, query_more, query_far, batch, queries, query_b,
            query_h, query_l, query_table_b, query_more_b, query_more_h, query_more_l, query_far_b, query_far_h,
            query_far_l, head, HQ, CQ, PQ, MQ, HEADS_Q, SAMPLES_Q, D, DP, W, PP, PARTS, BLOCK,
        )  # fmt: skip
    elif HK > 0:
        if head < HK:
            _append_side(
                key, key_out, key_table, key_matrix, key_piece, key_more, key_far, batch, keys, key_b, key_h, key_l,
                key_table_b, key_more_b, key_more_h, key_more_l, key_far_b, key_far_h, key_far_l, head, HK, CK, PK, MK,
                HEADS_K, SAMPLES_K, D, DP, W, PP, PARTS, BLOCK,
            )  # fmt: skip


@triton.jit
def _split_side(
    grad, out, sums, table, piece, batch, length, stride_b, stride_h, stride_l, table_b, head, c_block,
    H: tl.constexpr, C: tl.constexpr, P: tl.constexpr, PER_SAMPLE: tl.constexpr, LEARNS: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, PP: tl.constexpr, CT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the content's gradient out, and sum columns of the table times the leading lanes' over some tokens."""
    cols, columns, features = tl.arange(0, PP), tl.arange(0, DP), c_block * CT + tl.arange(0, CT)
    sample, samples = tl.program_id(0) // PARTS, tl.num_programs(0) // PARTS
    total = tl.zeros([CT, PP], tl.float32)
    for start in range(tl.program_id(0) % PARTS * BLOCK, length, PARTS * BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside, tokens = (rows < length)[:, None], rows[:, None].to(tl.int64)
        has_content = inside & (columns < D)[None, :]
        lanes = tl.zeros([BLOCK, PP], tl.float32)
        place = table + features[:, None] + rows[None, :].to(tl.int64) * C if LEARNS else None
        is_feature = (features < C)[:, None] & (rows < length)[None, :]
        for number in range(sample, batch, samples):
            b = tl.full([], 0, tl.int64) + number
            source = grad + b * stride_b + head * stride_h + tokens * stride_l
            if c_block == 0:
                target = out + ((b * length + tokens) * H + head) * D + columns[None, :]
                tl.store(target, tl.load(source + columns[None, :], mask=has_content), mask=has_content)
            if LEARNS:
                wanted = (tl.load(piece + cols, mask=cols < P, other=1) == 0) & (cols < P)
                lane = tl.load(source + D + cols[None, :], mask=inside & wanted[None, :], other=0.0).to(tl.float32)
                if PER_SAMPLE:
                    feature = tl.load(place + b * table_b, mask=is_feature, other=0.0)
                    total += tl.dot(feature, lane, input_precision="ieee")
                else:
                    lanes += lane
        if LEARNS and not PER_SAMPLE:
            total += tl.dot(tl.load(place, mask=is_feature, other=0.0), lanes, input_precision="ieee")
    if LEARNS:
        store = sums + (head * C + features[:, None]) * P + cols[None, :]
        tl.store(store, total, mask=(features < C)[:, None] & (cols < P)[None, :])


@triton.jit(do_not_specialize=_ANY_SIZE, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def split_kernel(
    query, query_out, query_table, query_piece, key, key_out, key_table, key_piece, sums, batch,
    queries, query_b, query_h, query_l, query_table_b, keys, key_b, key_h, key_l, key_table_b,
    HQ: tl.constexpr, CQ: tl.constexpr, PQ: tl.constexpr, SAMPLES_Q: tl.constexpr, LEARNS_Q: tl.constexpr,
    HK: tl.constexpr, CK: tl.constexpr, PK: tl.constexpr, SAMPLES_K: tl.constexpr, LEARNS_K: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, PP: tl.constexpr, CT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the content of both sides, and this program's share of those of the matrices."""
    head, c_block = tl.program_id(1).to(tl.int64), tl.program_id(2) // 2
    query_size: tl.constexpr = HQ * CQ * PQ if LEARNS_Q else 0
    key_size: tl.constexpr = HK * CK * PK if LEARNS_K else 0
    own = sums + tl.program_id(0) * (query_size + key_size)
    if tl.program_id(2) % 2 == 0:
        _split_side(
            query, query_out, own, query_table, query_piece, batch, queries, query_b, query_h, query_l, query_table_b,
            head, c_block, HQ, CQ, PQ, SAMPLES_Q, LEARNS_Q, D, DP, PP, CT, PARTS, BLOCK,
        )  # fmt: skip
    elif HK > 0:
        if head < HK:
            _split_side(
                key, key_out, own + query_size, key_table, key_piece, batch, keys, key_b, key_h, key_l, key_table_b,
                head, c_block, HK, CK, PK, SAMPLES_K, LEARNS_K, D, DP, PP, CT, PARTS, BLOCK,
            )  # fmt: skip
