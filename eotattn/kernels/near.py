"""Attention to near keys by blocks, with a tile of biases: exact gradients, also of the tile; no Q x K numbers.

Legend: B batch, H query heads, G query heads a key head, Q queries, K keys, D score width, V value width, W visible
lags, b queries of a block, S = b + W - 1 keys of a block, n blocks, T tiles: one for all blocks, or n.

Stock operators add a bias in the dtype of the content, which rounds it, and most have no gradient for it. What is near
is a small part of long attention, so it is computed in float32 (float64 for float64) by plain products of matrices,
again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Blocks", "attend"]

#: Queries of a block at least.
MIN_BLOCK = 64
#: Scores in memory at a time.
_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}


@dataclass(frozen=True)
class Blocks:
    """Which keys are near, and how queries are cut into blocks.

    Args:
        queries: Q.
        keys: K.
        offset: Query i and key i + offset have the same position.
        before: Query i sees keys from i + offset - before on.
        after: Query i sees keys up to i + offset + after.
        block: Queries of a block; by default half of what a query sees, so that two thirds of the scores count.
        whole: Whether a query sees all keys that any query of its block sees; without later ones if ``after`` is zero.
    """

    queries: int
    keys: int
    offset: int
    before: int
    after: int
    block: int | None = None
    whole: bool = False

    @property
    def size(self) -> int:
        """Queries b of a block."""
        return self.block or min(max((self.before + self.after + 1) // 2, MIN_BLOCK), self.queries)

    @property
    def span(self) -> int:
        """Keys S that any query of a block sees."""
        return self.size + self.before + self.after

    @property
    def count(self) -> int:
        """Blocks n; the last may be short of queries."""
        return -(-self.queries // self.size)

    def visible(self, device: torch.device) -> Tensor:
        """(b, S) boolean: which keys of its block a query sees."""
        lag = self.before + torch.arange(self.size, device=device)[:, None] - torch.arange(self.span, device=device)
        if self.whole:
            return (lag >= 0) | (self.after > 0)
        return (lag <= self.before) & (lag >= -self.after)

    def query_index(self, device: torch.device) -> Tensor:
        """(n, b) int64; beyond the last query its index."""
        index = torch.arange(self.count * self.size, device=device).clamp(max=self.queries - 1)
        return index.view(self.count, self.size)

    def key_index(self, device: torch.device) -> Tensor:
        """(n, S) int64; beyond the first and the last key theirs."""
        start = self.offset - self.before + self.size * torch.arange(self.count, device=device)
        return (start[:, None] + torch.arange(self.span, device=device)).clamp(0, self.keys - 1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tile: Tensor,
    key_bias: Tensor | None = None,
    *,
    scale: float,
    blocks: Blocks,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale * <query, key> + bias) over near keys, apply it to the values, and its log-sum-exp.

    Args:
        query: (B, H, Q, D).
        key: (B, H / G, K, D).
        value: (B, H / G, K, V).
        tile: (T, H, b, S) nats, what is added to the scores of a block; -inf hides a pair.
        key_bias: (B or 1, H or 1, K) nats, added to every score of a key; -inf hides it.
        scale: Factor on the inner products.
        blocks: Which keys are near.

    Returns:
        ``(output, lse)``: (B, H, Q, V) and (B, H, Q) nats, float64 for float64 and float32 otherwise. A query without
        keys has output zero and log-sum-exp -inf.
    """
    output, lse = _Near.apply(query, key, value, tile, key_bias, scale, blocks)
    return output, lse


class _Near(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tile: Tensor,
        key_bias: Tensor | None,
        scale: float,
        blocks: Blocks,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(query.dtype, torch.float32)
        work = _Work(query, key, value, tile, key_bias, scale, blocks, dtype)
        output = query.new_empty(*query.shape[:3], value.shape[-1], dtype=dtype)
        lse = query.new_empty(query.shape[:3], dtype=dtype)
        for first, count in work.chunks():
            scores, _, _ = work.scores(first, count)
            top = scores.amax(-1, keepdim=True)
            top = torch.where(top == float("-inf"), 0.0, top)
            masses = scores.sub_(top).exp_()
            total = masses.sum(-1, keepdim=True)
            part = masses @ work.spans(value, first, count)
            rows = work.rows(first, count)
            output[:, :, rows] = work.unblocked(part / torch.where(total == 0, 1.0, total), first)
            lse[:, :, rows] = work.unblocked(top + total.log(), first).squeeze(-1)
        ctx.save_for_backward(query, key, value, tile, key_bias, output, lse)
        ctx.options = (scale, blocks)
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, tile, key_bias, output, lse = ctx.saved_tensors
        scale, blocks = ctx.options
        work = _Work(query, key, value, tile, key_bias, scale, blocks, lse.dtype)
        shift = (grad_lse - (grad_output * output).sum(-1)).unsqueeze(-1)
        finite = torch.where(lse == float("-inf"), 0.0, lse).unsqueeze(-1)
        needs_tile, needs_bias = ctx.needs_input_grad[3:5]
        grad_query = query.new_empty(query.shape)
        heads = (query.shape[0], query.shape[1], key.shape[2])
        grad_key, grad_value = (lse.new_zeros(*heads, side.shape[-1]) for side in (key, value))
        grad_bias = lse.new_zeros(*heads, 1) if needs_bias else None
        grad_tile = lse.new_zeros(tile.shape) if needs_tile else None
        for first, count in work.chunks():
            scores, queries, keys = work.scores(first, count)
            weights = scores.sub_(work.blocked(finite, first, count, fill=float("inf"))).exp_()
            above = work.blocked(grad_output, first, count)
            work.add_spans(grad_value, weights.mT @ above, first)
            grads = (above @ work.spans(value, first, count).mT).add_(work.blocked(shift, first, count)).mul_(weights)
            rows = work.rows(first, count)
            grad_query[:, :, rows] = work.unblocked(work.scale * (grads @ keys), first).to(query.dtype)
            work.add_spans(grad_key, grads.mT @ queries, first)
            if grad_bias is not None:
                work.add_spans(grad_bias, grads.sum(-2).unsqueeze(-1), first)
            if grad_tile is not None:
                each = grads.sum(0).transpose(0, 1)
                if tile.shape[0] == 1:
                    grad_tile += each.sum(0, keepdim=True)
                else:
                    grad_tile[first : first + count] = each
        group = query.shape[1] // key.shape[1]
        grad_key, grad_value = (grad.unflatten(1, (-1, group)).sum(2) for grad in (grad_key, grad_value))
        return (
            grad_query,
            grad_key.to(key.dtype),
            grad_value.to(value.dtype),
            None if grad_tile is None else grad_tile.to(tile.dtype),
            None if grad_bias is None else grad_bias.squeeze(-1).sum_to_size(key_bias.shape).to(key_bias.dtype),
            None,
            None,
        )


@dataclass(frozen=True)
class _Work:
    """Blocks of one call, a few at a time."""

    query: Tensor
    key: Tensor
    value: Tensor
    tile: Tensor
    key_bias: Tensor | None
    scale: float
    blocks: Blocks
    dtype: torch.dtype

    def chunks(self) -> list[tuple[int, int]]:
        """(first block, number of blocks) of what is computed at a time."""
        blocks, (batch, heads) = self.blocks, self.query.shape[:2]
        each = max(1, batch * heads * blocks.size * blocks.span)
        step = max(1, _ELEMENTS.get(self.query.device.type, _ELEMENTS["cpu"]) // each)
        return [(first, min(step, blocks.count - first)) for first in range(0, blocks.count, step)]

    def rows(self, first: int, count: int) -> slice:
        """Queries of some blocks."""
        size = self.blocks.size
        return slice(first * size, min((first + count) * size, self.blocks.queries))

    def blocked(self, side: Tensor, first: int, count: int, fill: float = 0.0) -> Tensor:
        """(B, H, Q, X) as (B, H, count, b, X); ``fill`` beyond the last query."""
        size, rows = self.blocks.size, side[:, :, self.rows(first, count)].to(self.dtype)
        rows = functional.pad(rows, (0, 0, 0, count * size - rows.shape[2]), value=fill)
        return rows.unflatten(2, (count, size))

    def unblocked(self, side: Tensor, first: int) -> Tensor:
        """(B, H, count, b, X) as (B, H, up to count * b, X)."""
        return side.flatten(2, 3)[:, :, : self.blocks.queries - first * self.blocks.size]

    def spans(self, side: Tensor, first: int, count: int, fill: float = 0.0) -> Tensor:
        """(B, 1 or H / G or H, K, X) as (B, 1 or H, count, S, X); ``fill`` beyond the first and the last key."""
        start, stop = self._reach(first, count)
        rows = side[:, :, max(start, 0) : max(stop, 0)].to(self.dtype)
        rows = functional.pad(rows, (0, 0, *self._missing(start, stop)), value=fill)
        spans = rows.unfold(2, self.blocks.span, self.blocks.size).transpose(-1, -2)
        heads = self.query.shape[1]
        return spans if side.shape[1] in (1, heads) else spans.repeat_interleave(heads // side.shape[1], dim=1)

    def add_spans(self, total: Tensor, spans: Tensor, first: int) -> None:
        """Add (B, H, count, S, X) to (B, H, K, X), where neighbouring spans overlap."""
        size, span, count = self.blocks.size, self.blocks.span, spans.shape[2]
        pieces = -(-span // size)
        spans = functional.pad(spans, (0, 0, 0, pieces * size - span)).unflatten(3, (pieces, size))
        summed = spans.new_zeros(*spans.shape[:2], count + pieces - 1, size, spans.shape[-1])
        for piece in range(pieces):
            summed[:, :, piece : piece + count] += spans[:, :, :, piece]
        start, stop = self._reach(first, count)
        before, _ = self._missing(start, stop)
        low, high = max(start, 0), min(stop, self.blocks.keys)
        if high > low:
            total[:, :, low:high] += summed.flatten(2, 3)[:, :, before : before + high - low]

    def scores(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores with all biases, (B, H, count, b, S); the queries times the scale, and the keys, as they were used."""
        queries = self.scale * self.blocked(self.query, first, count)
        keys = self.spans(self.key, first, count)
        scores = queries @ keys.mT
        tile = self.tile if self.tile.shape[0] == 1 else self.tile[first : first + count]
        scores += tile.transpose(0, 1).to(self.dtype)
        start, stop = self._reach(first, count)
        bias = self.key_bias
        if bias is None and (start < 0 or stop > self.blocks.keys):
            bias = self.query.new_zeros(1, 1, self.blocks.keys)
        if bias is not None:
            scores += self.spans(bias.unsqueeze(-1), first, count, fill=float("-inf")).mT
        return scores, queries, keys

    def _reach(self, first: int, count: int) -> tuple[int, int]:
        """First key of some blocks, and the one after the last; may lie beyond what there is."""
        start = self.blocks.offset - self.blocks.before + first * self.blocks.size
        return start, start + (count - 1) * self.blocks.size + self.blocks.span

    def _missing(self, start: int, stop: int) -> tuple[int, int]:
        """Keys from ``start`` to ``stop`` that do not exist, before the first and after the last."""
        low, high = max(start, 0), max(min(stop, self.blocks.keys), max(start, 0))
        if low >= self.blocks.keys or stop <= 0:
            return 0, stop - start
        return low - start, stop - high
