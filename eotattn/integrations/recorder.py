"""What a capture collects: one attention call at a time, checked against what the model itself computed.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eotattn.attention.running import SequenceStatistics
from eotattn.attention.score_rows import RowSource
from eotattn.attention.statistics import AttentionStatistics, row_statistics
from eotattn.checks import require

__all__ = ["CapturedCall", "Recorder"]

OWNER = "capture"

#: Rows of every call whose output is compared with the model's.
CHECKED_ROWS = 4
#: Largest admissible deviation of those rows, relative to the largest entry.
OUTPUT_BOUND = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True, eq=False)
class CapturedCall:
    """One attention call of a model, in the terms of :func:`eotattn.attention.statistics.row_statistics`.

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
        sink_logits: (H,) explicit sink, nats.
        query_start: Position of the first query, tokens.
        key_start: Position of the first key, tokens.
        sequence_start: (B,) position of the first token that is not padding.
        counted: (B, Q) false where a query is padding.
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

    def statistics(self, keys: tuple[int, ...], *, with_output: bool = False) -> AttentionStatistics:
        """Statistics of all rows."""
        names = ("scale", "softcap", "log_prior", "mask", "is_causal", "window", "sink_logits", "query_start")
        more = ("key_start", "sequence_start", "counted")
        arguments: dict[str, Any] = {name: getattr(self, name) for name in (*names, *more)}
        value = self.value if with_output else None
        return row_statistics(self.query, self.key, value, keys=keys, **arguments)

    def tail(self, count: int) -> CapturedCall:
        """The last ``count`` queries alone."""
        skipped = max(0, self.query.shape[2] - count)

        def shifted(rows: RowSource | None) -> RowSource | None:
            return None if rows is None else lambda start, stop: rows(start + skipped, stop + skipped)

        return replace(
            self,
            query=self.query[:, :, skipped:],
            log_prior=shifted(self.log_prior),
            mask=shifted(self.mask),
            query_start=self.query_start + skipped,
            counted=None if self.counted is None else self.counted[:, skipped:],
        )


class Recorder:
    """Statistics by layer, in the order of the first call.

    Args:
        layers: Names or indices of the layers to keep; ``None`` for all.
        heads: Indices of the heads to keep; ``None`` for all.
        keys: Chosen keys, counted from the start of each sequence.
        on_rows: Called with (layer name, row statistics) after every call that is kept.
    """

    def __init__(
        self,
        layers: Sequence[str | int] | None,
        heads: Sequence[int] | None,
        keys: tuple[int, ...],
        on_rows: Callable[[str, AttentionStatistics], None] | None,
    ) -> None:
        self.wanted = None if layers is None else list(layers)
        self.heads = None if heads is None else list(heads)
        self.keys, self.on_rows = keys, on_rows
        self.statistics: dict[str, SequenceStatistics] = {}
        self.seen: dict[str, int] = {}
        self.priors: dict[str, Any] = {}
        self.num_forwards = 0
        self.stack: list[str] = []
        self._next: dict[str, tuple[int, int]] = {}
        self._continuing = False
        self._muted = 0

    @property
    def is_listening(self) -> bool:
        """Whether a call that arrives now belongs to the model and is not part of one already recorded."""
        return bool(self.stack) and not self._muted

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Do not record calls inside: they serve one that is recorded already."""
        self._muted += 1
        try:
            yield
        finally:
            self._muted -= 1

    def begin_forward(self) -> None:
        """A new pass of the whole model starts."""
        self.num_forwards += 1
        self._continuing = False

    def keeps(self, name: str) -> bool:
        """Whether this layer is wanted; numbers layers as they first appear."""
        index = self.seen.setdefault(name, len(self.seen))
        return self.wanted is None or name in self.wanted or index in self.wanted

    def record(self, name: str, call: CapturedCall, output: Tensor | None) -> None:
        """Add one call of layer ``name``; ``output`` (B, H, Q, V) is what the model computed, for comparison."""
        if not self.keeps(name):
            return
        with torch.no_grad():
            if output is not None:
                self._compare(name, call, output)
            rows = call.statistics(self.keys)
            if self.on_rows is not None:
                self.on_rows(name, rows)
            self._accumulate(name, call, SequenceStatistics.of(rows))

    def _accumulate(self, name: str, call: CapturedCall, new: SequenceStatistics) -> None:
        if self.heads is not None:
            known = all(-new.num_heads <= head < new.num_heads for head in self.heads)
            rule = f"name heads from 0 to {new.num_heads - 1} of layer {name!r}"
            require(known, OWNER, "heads", rule, self.heads, "Choose heads that the layer has")
            new = new.heads(self.heads)
        batch, start = call.query.shape[0], call.query_start
        follows = start > 0 and self._next.get(name) == (batch, start)
        self._continuing = self._continuing or follows
        old = self.statistics.get(name)
        if old is None:
            self.statistics[name] = new
        elif follows or (self._continuing and call.query.shape[2] == 1 and old.num_sequences >= batch):
            self.statistics[name] = old.continued(new)
        else:
            self.statistics[name] = old + new
        self._next[name] = (batch, start + call.query.shape[2])

    def _compare(self, name: str, call: CapturedCall, output: Tensor) -> None:
        """Raise unless the statistics describe the attention that the model computed."""
        tail = call.tail(CHECKED_ROWS)
        rows = tail.statistics(self.keys, with_output=True)
        assert rows.output is not None
        ours, theirs = rows.output, output[:, :, -tail.query.shape[2] :]
        fits = ours.shape == theirs.shape
        error = float("inf")
        if fits:
            held = (rows.num_keys > 0).unsqueeze(-1)
            deviation = torch.where(held, ours - theirs.to(ours.dtype), 0.0).abs().amax()
            error = float(deviation / ours.abs().amax().clamp(min=1.0))
        if not error <= OUTPUT_BOUND[output.dtype]:
            raise NotImplementedError(
                f"{OWNER}: layer {name!r} does more than softmax(scale * <query, key> + bias) applied to values: its "
                f"output differs from that by {error:.1e}. Tried scale, soft cap, mask, window, position bias and "
                f"explicit sink as the model passed them; analyse its attention maps instead."
            )
