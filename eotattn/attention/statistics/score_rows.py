"""The logits of one attention call, a block of query rows at a time, never Q x K at once.

Legend: B batch, H query heads, Hk key heads, G query heads a key head, Q queries, K keys, D score width, r rows and
k keys of a block.

A logit is content + prior: content = scale * <query, key> (soft-capped where the model does so), prior = everything
that is added to it (log-priors, position biases, floating masks). Masks decide which keys are admissible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from eotattn.priors.lanes import Lanes
from eotattn.priors.reading import expand_heads

__all__ = [
    "LaneRows",
    "RowSource",
    "ScoreBlock",
    "ScoreRows",
    "ScoreSource",
    "TensorRows",
    "WeightRows",
    "split_table",
]

#: Gives rows ``start`` to ``stop`` of a Q x K table, broadcastable to (B, H, stop - start, K).
RowSource = Callable[[int, int], Tensor]

#: Elements of one block of logits; a pass holds about ten such blocks.
BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}
#: Blocks end at multiples of this part of the keys, so that few sizes occur and the allocator can reuse them.
KEY_PARTS = 8


@dataclass(frozen=True, eq=False)
class TensorRows:
    """Rows of a table that broadcasts to (B, H, Q, K)."""

    table: Tensor

    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``."""
        shared = self.table.dim() < 2 or self.table.shape[-2] == 1
        return self.table if shared else self.table[..., start:stop, :]


@dataclass(frozen=True, eq=False)
class LaneRows:
    """Rows of a log-prior given by its lanes, which state it up to a constant of each row."""

    lanes: Lanes

    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, (..., H, stop - start, K), float32 or float64."""
        return replace(self.lanes, query=self.lanes.query[..., start:stop, :]).dense()


@dataclass(frozen=True)
class ScoreBlock:
    """Logits of rows ``start`` to ``stop`` against keys ``first_key`` onwards; other keys are inadmissible.

    Args:
        start: First row.
        stop: Row after the last.
        first_key: Index of the first key of the block.
        content: (B, H, r, k) content scores, nats.
        prior: Broadcastable to ``content``, nats, finite at admissible keys; ``None`` for zero.
        admissible: Boolean, broadcastable to ``content``; ``None`` for all.
    """

    start: int
    stop: int
    first_key: int
    content: Tensor
    prior: Tensor | None
    admissible: Tensor | None


class ScoreSource(Protocol):
    """What gives blocks of logits: an attention call, or a stored attention map."""

    @property
    def query_start(self) -> int:
        """Position of the first query, tokens."""

    @property
    def key_start(self) -> int:
        """Position of the first key, tokens."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q, K)."""

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""

    @property
    def device(self) -> torch.device:
        """Where blocks live."""

    def block(self, start: int, stop: int) -> ScoreBlock:
        """Rows ``start`` to ``stop``."""


def block_spans(source: ScoreSource, max_elements: int | None = None) -> Iterator[tuple[int, int]]:
    """Spans of rows whose blocks have at most ``max_elements`` entries (one row at least)."""
    batch, heads, queries, keys = source.shape
    limit = max_elements or BLOCK_ELEMENTS.get(source.device.type, BLOCK_ELEMENTS["cpu"])
    rows = max(1, limit // max(1, batch * heads * keys))
    for start in range(0, queries, rows):
        yield start, min(start + rows, queries)


@dataclass(frozen=True)
class ScoreRows:
    """Logits of an attention call.

    Args:
        query: (B, H, Q, D), floating; blocks are made from float32 and float64.
        key: (B, Hk, K, D); Hk divides H, nothing is repeated in memory.
        scale: Factor on the inner products.
        softcap: c of c tanh(score / c), nats.
        log_prior: Rows of what is added to the content, nats; -inf where inadmissible.
        mask: Rows of a mask, boolean (true may attend) or floating and added; -inf or the dtype's lowest number
            mark inadmissible keys.
        is_causal: Keys at later positions are inadmissible; positions are ``query_start + i`` and ``key_start + j``.
        window: Keys ``window`` or more tokens before the query are inadmissible.
        query_start: Position of the first query, tokens.
        key_start: Position of the first key, tokens.
        key_bias: (B, 1 or Hk or H, K), nats, added to every score of a key; a part of the prior.
    """

    query: Tensor
    key: Tensor
    scale: float
    softcap: float | None = None
    log_prior: RowSource | None = None
    mask: RowSource | None = None
    is_causal: bool = False
    window: int | None = None
    query_start: int = 0
    key_start: int = 0
    key_bias: Tensor | None = None

    def widened(self) -> ScoreRows:
        """The same call with content in the dtype of the logits."""
        return replace(self, query=self.query.to(self.dtype), key=self.key.to(self.dtype))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q, K)."""
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries, self.key.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits: float64 for float64, else float32."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the logits live."""
        return self.query.device

    def block(self, start: int, stop: int) -> ScoreBlock:
        """Logits of rows ``start`` to ``stop``, without keys that causality or the window exclude for all of them."""
        first, last = self._key_span(start, stop)
        content = self.content(start, stop, first, last)
        prior, admissible = self._of_keys(first, last), self._by_position(start, stop, first, last)
        for source in (self.log_prior, self.mask):
            if source is None:
                continue
            added, seen = split_table(_columns(source(start, stop), first, last), self.dtype)
            if added is not None:
                prior = added if prior is None else prior + added
            admissible = seen if admissible is None else admissible & seen
        return ScoreBlock(start, stop, first, content, prior, admissible)

    def _key_span(self, start: int, stop: int) -> tuple[int, int]:
        keys, shift = self.key.shape[2], self.query_start - self.key_start
        last = min(keys, shift + stop) if self.is_causal else keys
        first = 0 if self.window is None else max(0, shift + start - self.window + 1)
        step = max(1, keys // KEY_PARTS)
        last = min(keys, -(-max(last, 1) // step) * step)
        return min(first, last - 1), last

    def content(self, start: int, stop: int, first: int = 0, last: int | None = None) -> Tensor:
        """(B, H, stop - start, last - first) content scores, nats."""
        query = self.query[:, :, start:stop] * self.scale
        key = self.key[:, :, first:last]
        shape = (*query.shape[:3], key.shape[2])
        grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B, Hk, G r, D)
        score = (grouped @ key.transpose(-1, -2)).view(shape)
        return score if self.softcap is None else self.softcap * torch.tanh(score / self.softcap)

    def _of_keys(self, first: int, last: int) -> Tensor | None:
        """(B, H, 1, last - first) bias of keys, nats."""
        if self.key_bias is None:
            return None
        return expand_heads(self.key_bias[..., first:last], self.query.shape[1]).to(self.dtype).unsqueeze(2)

    def _by_position(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        if not self.is_causal and self.window is None:
            return None
        query_at = torch.arange(self.query_start + start, self.query_start + stop, device=self.device)[:, None]
        key_at = torch.arange(self.key_start + first, self.key_start + last, device=self.device)
        seen = key_at <= query_at if self.is_causal else torch.ones_like(key_at <= query_at)
        return seen if self.window is None else seen & (key_at > query_at - self.window)


@dataclass(frozen=True)
class WeightRows:
    """Logits of a stored attention map: the logarithm of the weights.

    A softmax gives back the weights; margins are exact, content and prior cannot be told apart. A weight of zero at an
    admissible key counts as the largest number that its dtype rounds to zero.

    Args:
        weights: (B, H, Q, K), rows sum to one (or to zero where no key is admissible).
        query_start: Position of the first query, tokens.
        key_start: Position of the first key, tokens.
        admissible: Boolean, broadcastable to the weights; by default, keys of weight zero are inadmissible.
        has_sink: Whether rows sum to less than one, and the rest is an explicit sink's, of logit zero.
    """

    weights: Tensor
    query_start: int = 0
    key_start: int = 0
    admissible: Tensor | None = None
    has_sink: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q, K)."""
        batch, heads, queries, keys = self.weights.shape
        return batch, heads, queries, keys

    @property
    def dtype(self) -> torch.dtype:
        """float64 for float64 weights, else float32."""
        return torch.promote_types(self.weights.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.weights.device

    def block(self, start: int, stop: int) -> ScoreBlock:
        """Logarithms of rows ``start`` to ``stop``."""
        weights = self.weights[:, :, start:stop].to(self.dtype)
        seen, total = weights > 0, weights.sum(-1, keepdim=True)
        info = torch.finfo(self.weights.dtype)
        floor = math.log(info.tiny) + math.log(info.eps) - math.log(2)  # half of the smallest number
        content = torch.where(seen, weights, 1.0).log().masked_fill(~seen, floor)
        if self.has_sink:  # softmax of these and of zero
            content = content - (1 - total).clamp(min=torch.finfo(self.dtype).tiny).log()
        if self.admissible is not None:
            seen = TensorRows(self.admissible)(start, stop) & (total > 0)
        return ScoreBlock(start, stop, 0, content, None, seen)


def _columns(rows: Tensor, first: int, last: int) -> Tensor:
    return rows if rows.dim() == 0 or rows.shape[-1] == 1 else rows[..., first:last]


def split_table(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """What a table adds, finite everywhere, and which keys it admits."""
    if rows.dtype == torch.bool:
        return None, rows
    seen = rows > torch.finfo(rows.dtype).min / 2
    return torch.where(seen, rows, 0.0).to(dtype), seen
