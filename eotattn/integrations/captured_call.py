"""One attention call of a model, in the terms of :func:`eotattn.attention.statistics.row_statistics`.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, V value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eotattn.attention.statistics import AttentionStatistics, row_statistics
from eotattn.attention.statistics.block_statistics import sink_of_rows
from eotattn.attention.statistics.score_rows import RowSource, ScoreRows

__all__ = ["CapturedCall"]


@dataclass(frozen=True, eq=False)
class CapturedCall:
    """One attention call.

    Args:
        query: (B, H, Q, D).
        key: (B, Hk, K, D).
        value: (B, Hk, K, V).
        scale: Factor on the inner products; ``None`` for 1 / sqrt(D).
        softcap: Soft cap of the content scores, nats.
        log_prior: Rows of what is added to the scores, nats.
        mask: Rows of the mask.
        is_causal: Whether later positions are inadmissible.
        window: Sliding window, tokens.
        sink_logits: (H,), or (B or 1, H, Q or 1): logit of an explicit sink, nats.
        query_start: Position of the first query, tokens.
        key_start: Position of the first key, tokens.
        sequence_start: (B,) position of the first token that is not padding.
        counted: (B, Q) false where a query is padding.
        crosses: Whether queries and keys belong to different sequences.
        attend: The same call of the model's own function with other values, (B, Hk, K, V) -> (B, H, Q, V).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None = None
    softcap: float | None = None
    log_prior: RowSource | None = None
    mask: RowSource | None = None
    is_causal: bool = False
    window: int | None = None
    sink_logits: Tensor | None = None
    query_start: int = 0
    key_start: int = 0
    sequence_start: Tensor | None = None
    counted: Tensor | None = None
    crosses: bool = False
    attend: Callable[[Tensor], Tensor] | None = None

    def statistics(self, keys: tuple[int, ...], *, with_output: bool = False) -> AttentionStatistics:
        """Statistics of all rows."""
        names = ("scale", "softcap", "log_prior", "mask", "is_causal", "window", "sink_logits", "query_start")
        more = ("key_start", "sequence_start", "counted")
        arguments: dict[str, Any] = {name: getattr(self, name) for name in (*names, *more)}
        value = self.value if with_output else None
        return row_statistics(self.query, self.key, value, keys=keys, **arguments)

    def source(self, dtype: torch.dtype) -> ScoreRows:
        """Its logits, block by block, in ``dtype``."""
        scale = 1 / math.sqrt(self.query.shape[-1]) if self.scale is None else self.scale
        names = ("softcap", "log_prior", "mask", "is_causal", "window", "query_start", "key_start")
        arguments: dict[str, Any] = {name: getattr(self, name) for name in names}
        return ScoreRows(self.query.to(dtype), self.key.to(dtype), scale, **arguments)

    def tail(self, count: int) -> CapturedCall:
        """The last ``count`` queries alone; it cannot be repeated."""
        skipped = max(0, self.query.shape[2] - count)

        def shifted(rows: RowSource | None) -> RowSource | None:
            return None if rows is None else lambda start, stop: rows(start + skipped, stop + skipped)

        return replace(
            self,
            query=self.query[:, :, skipped:],
            log_prior=shifted(self.log_prior),
            mask=shifted(self.mask),
            sink_logits=None if self.sink_logits is None else sink_of_rows(self.sink_logits, skipped),
            query_start=self.query_start + skipped,
            counted=None if self.counted is None else self.counted[:, skipped:],
            attend=None,
        )

    @property
    def real_keys(self) -> Tensor:
        """(B, K) true at keys that are not padding, as far as the model was told."""
        batch, keys, device = self.query.shape[0], self.key.shape[2], self.query.device
        real = torch.ones(batch, keys, dtype=torch.bool, device=device)
        if self.sequence_start is not None:
            at = torch.arange(self.key_start, self.key_start + keys, device=device)
            real = at >= self.sequence_start.to(device)[:, None]
        if self.counted is not None and self.counted.shape[1] == keys:
            real = real & self.counted.to(device)
        return real
