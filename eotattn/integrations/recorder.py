"""What a capture collects: one attention call at a time, checked against what the model itself computed.

Legend: B batch, N sequences, H query heads, Q queries, K keys, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from eotattn.attention.statistics import AttentionStatistics, weight_statistics
from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.attention.statistics.score_rows import ScoreSource, WeightRows
from eotattn.checks import check_indices, require
from eotattn.compat import in_backward_pass
from eotattn.diagnostics.grid_statistics import GridStatistics
from eotattn.diagnostics.token_statistics import TokenStatistics
from eotattn.diagnostics.top_keys import TopKeys
from eotattn.integrations.captured_call import CapturedCall
from eotattn.integrations.certificates import call_certificate
from eotattn.integrations.frames import Frame, Frames, base_name, is_cross_attention
from eotattn.integrations.value_probe import ValueProbe

__all__ = ["Recorder"]

OWNER = "capture"

#: Rows of every call whose output is compared with the model's, and that are certified.
CHECKED_ROWS = 4
#: Largest admissible deviation of those rows, relative to the largest entry.
OUTPUT_BOUND = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
#: Largest |sum of a row - 1| of attention weights that a module returns.
WEIGHT_BOUND = 1e-2


class Recorder:
    """Statistics by layer, in the order of the first call.

    Args:
        layers: Names or indices of the layers to keep; ``None`` for all.
        heads: Indices of the heads to keep; ``None`` for all.
        sink_positions: Chosen keys, counted from the start of each sequence.
        values: Whether values are looked at.
        token_scores: Whether weights are summed over keys whose token repeats.
        top_key_rows: First queries of every whole sequence whose strongest keys are kept.
        on_rows: Called with (layer name, row statistics) after every call that is kept.
        certify: Whether the weights of the last rows of every call are certified.
        grid: Rows and columns of tokens, to collect lags in two axes as well.

    Attributes:
        statistics: Layer -> sums by sequence.
        value_probe: What values do, by layer.
        certificates: Layer -> (N, H) largest duality gap of the last rows of every call, nats.
        grids: Layer -> sums by lag in two axes.
        token_scores: Layer -> sums over keys whose token repeats, where ids were seen; ``None`` where not asked for.
        top_keys: Layer -> strongest keys of the first queries, where that was asked for.
        seen: Layer -> its number among all layers.
        from_weights: Layers whose statistics come from the weights that their module returned.
    """

    def __init__(  # noqa: PLR0913  (one argument an option of the watch)
        self,
        layers: Sequence[str | int] | None = None,
        heads: Sequence[int] | None = None,
        sink_positions: tuple[int, ...] = (0,),
        *,
        values: bool = True,
        token_scores: bool = False,
        top_key_rows: int = 0,
        on_rows: Callable[[str, AttentionStatistics], None] | None = None,
        certify: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> None:
        self.wanted = None if layers is None else list(layers)
        self.heads = None if heads is None else list(heads)
        self.sink_positions, self.on_rows, self.certify, self.grid = sink_positions, on_rows, certify, grid
        self.value_probe = ValueProbe(sink_positions[0], self.heads) if values else None
        self.token_scores: dict[str, TokenStatistics] | None = {} if token_scores else None
        self.top_key_rows = top_key_rows
        self.top_keys: dict[str, TopKeys] = {}
        self.certificates: dict[str, Tensor] = {}
        self.grids: dict[str, GridStatistics] = {}
        self.statistics: dict[str, SequenceStatistics] = {}
        self.seen: dict[str, int] = {}
        self.from_weights: dict[str, None] = {}
        self.priors: dict[str, Any] = {}
        self.frames = Frames()
        self._next: dict[str, tuple[int, int]] = {}
        self._continuing = False
        self._muted = 0

    @property
    def is_listening(self) -> bool:
        """Whether a call that arrives now belongs to the model and is not part of one already recorded."""
        return bool(self.frames.stack) and not self._muted

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Do not record calls inside: they serve one that is recorded already."""
        self._muted += 1
        try:
            yield
        finally:
            self._muted -= 1

    def enter(self, frame: Frame, *, ask_weights: bool) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A module starts to run; return what it shall be given instead."""
        if self._muted:
            return None
        if not self.frames.stack:
            self._continuing = False
        self.frames.enter(frame)
        if self.value_probe is not None:
            with self.muted():
                self.value_probe.entered(frame.module, frame.args, frame.kwargs)
        return frame.asking_weights() if ask_weights else None

    def leave(self, output: Any) -> Any:
        """The module that runs returned ``output``; attention that made no call may have returned its weights.

        Returns:
            What the model gets, without weights that it did not ask for.
        """
        if self._muted:
            return output
        frame = self.frames.stack[-1]
        if frame.is_attention and not frame.arrived:
            self._record_returned(frame, output)
        self.frames.leave(output)
        if not self.frames.stack and self.value_probe is not None:
            self.value_probe.left()
        if frame.asks_weights and isinstance(output, tuple):
            return tuple(None if _are_weights(part) else part for part in output)
        return output

    def keeps(self, name: str) -> bool:
        """Whether this layer is wanted; numbers layers as they first appear.

        What runs within a backward pass is recomputed from a checkpoint, and was recorded before.
        """
        self.frames.arrived()
        if in_backward_pass():
            return False
        index = self.seen.setdefault(name, len(self.seen))
        return self.wanted is None or not {name, base_name(name), index}.isdisjoint(self.wanted)

    def continues(self, name: str, batch: int, start: int) -> bool:
        """Whether queries from ``start`` on follow the last call of layer ``name``: decoding with a cache."""
        return start > 0 and self._next.get(name) == (batch, start)

    def check_no_return(self, name: str, batch: int, start: int) -> None:
        """Raise if queries at known positions from ``start`` on replace some of the last call of layer ``name``."""
        known, reached = self._next.get(name, (0, 0))
        if 0 < start < reached and known == batch:
            raise NotImplementedError(
                f"{OWNER}: layer {name!r} returned from token {reached} to token {start}: tokens were rejected, as in "
                f"speculative decoding, or a cache was used twice, and rows that were counted stay counted. Generate "
                f"first, then capture one pass over the whole text."
            )

    def record(self, name: str, call: CapturedCall, output: Tensor | None) -> None:
        """Add one call of layer ``name``; ``output`` (B, H, Q, V) is what the model computed, for comparison."""
        if not self.keeps(name):
            return
        with torch.no_grad():
            if output is not None:
                self._compare(name, call, output)
            rows = call.statistics(self.sink_positions)
            follows = self._add_rows(name, rows, call.query_start, crosses=call.crosses)
            if self.value_probe is not None and output is not None and not follows:
                self.value_probe.offer(name, call, output, rows.key_mass[..., 0])
            if self.certify and output is not None:
                self._certify(name, call)
            if self.grid is not None:
                self._add_grid(name, call, self.grid)
            is_whole = not call.crosses and call.query.shape[2] == call.key.shape[2]
            if is_whole and (self.token_scores is not None or self.top_key_rows):
                source = call.source(torch.promote_types(call.query.dtype, torch.float32))
                self._add_pairs(name, source, counted=call.counted, sink_logits=call.sink_logits)

    def _record_returned(self, frame: Frame, output: Any) -> None:
        """Statistics of the weights that a module returned which makes no call that can be seen."""
        parts = output if isinstance(output, (tuple, list)) else (output,)
        weights = next((part for part in parts if _are_weights(part)), None)
        given = [x for x in (*frame.args, *frame.kwargs.values()) if isinstance(x, Tensor) and x.dim() == 3]
        if weights is None or not given or weights.shape[::2] != given[0].shape[:2]:
            return  # sparse forms have other axes
        name = self.frames.layer_name(frame.name, weights, weights)
        if not self.keeps(name):
            return
        batch, _, queries, keys = weights.shape
        start, crosses = keys - queries, is_cross_attention(name)
        is_whole = not crosses and (start == 0 or self.continues(name, batch, start))
        real = self.frames.real_tokens(batch) if is_whole else None
        places: dict[str, Any] = {}
        if real is not None and real.shape[1] == keys:
            places = {"counted": real[:, start:], "sequence_start": real.int().argmax(-1)}
        start = start if is_whole else 0
        with torch.no_grad():
            rows = weight_statistics(weights.detach(), query_start=start, keys=self.sink_positions, **places)
            self._add_rows(name, rows, start, crosses=crosses)
            if is_whole and queries == keys:
                self._add_pairs(name, WeightRows(weights.detach()), counted=places.get("counted"))
        self.from_weights[name] = None

    def _add_rows(self, name: str, rows: AttentionStatistics, start: int, *, crosses: bool) -> bool:
        """Add the rows of a call; return whether they continue sequences that are there."""
        if self.on_rows is not None:
            self.on_rows(name, rows)
        new = SequenceStatistics.of(rows)
        if self.heads is not None:
            where = f" of layer {name!r}"
            new = new.heads(check_indices(OWNER, "heads", self.heads, new.num_heads, where=where))
        batch, queries = rows.counted.shape
        follows = self.continues(name, batch, start)
        self._continuing = self._continuing or follows
        old = self.statistics.get(name)
        follows = follows or (self._continuing and (queries == 1 or crosses))
        follows = follows and old is not None and old.num_sequences >= batch
        if old is None:
            self.statistics[name] = new
        else:
            self.statistics[name] = old.continued(new) if follows else old + new
        self._next[name] = (batch, start + queries)
        return follows

    def _add_pairs(self, name: str, source: ScoreSource, **options: Tensor | None) -> None:
        """What is said of single pairs of tokens, where the whole sequence is there: its ids and its keys."""
        sink_logits = options.get("sink_logits")
        if self.top_key_rows:
            _add(self.top_keys, name, TopKeys.of(source, rows=self.top_key_rows, sink_logits=sink_logits), self.heads)
        ids = self.frames.token_ids(source.shape[0])
        if self.token_scores is not None and ids is not None and ids.shape[1] == source.shape[3]:
            _add(self.token_scores, name, TokenStatistics.of(source, ids, **options), self.heads)

    def _add_grid(self, name: str, call: CapturedCall, grid: tuple[int, int]) -> None:
        plain = call.sink_logits is None
        require(plain, OWNER, "grid", "meet no explicit sink", name, "Rows must sum to one")
        source = call.source(torch.promote_types(call.query.dtype, torch.float32))
        _add(self.grids, name, GridStatistics.of(source, *grid), self.heads)

    def _certify(self, name: str, call: CapturedCall) -> None:
        with self.muted():
            gaps = call_certificate(call, rows=CHECKED_ROWS)
        if gaps is not None:
            gaps = gaps if self.heads is None else gaps[:, self.heads]
            old = self.certificates.get(name)
            self.certificates[name] = gaps if old is None else torch.cat([old, gaps])

    def _compare(self, name: str, call: CapturedCall, output: Tensor) -> None:
        """Raise unless the statistics describe the attention that the model computed."""
        tail = call.tail(CHECKED_ROWS)
        rows = tail.statistics(self.sink_positions, with_output=True)
        assert rows.output is not None
        ours, theirs = rows.output, output[:, :, -tail.query.shape[2] :]
        broken = torch.stack([call.query.isnan().any(), call.key.isnan().any()]).any()
        remedy = "Check the weights and the dtype of the model"
        require(not bool(broken), OWNER, f"queries and keys of layer {name!r}", "be numbers", "NaN", remedy)
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


def _add(collected: dict[str, Any], name: str, new: Any, heads: list[int] | None) -> None:
    """Add the chosen heads of a call to those of the earlier calls of its layer."""
    new = new if heads is None else new.heads(heads)
    collected[name] = collected[name] + new if name in collected else new


def _are_weights(part: Any) -> bool:
    """Whether something is attention weights (B, H, Q, K): rows that sum to one, or to zero without keys."""
    if not isinstance(part, Tensor) or part.dim() != 4 or not part.is_floating_point() or part.numel() == 0:
        return False
    sums = part.detach().float().sum(-1)
    off = torch.minimum((sums - 1).abs(), sums.abs()).amax()
    return bool((part >= 0).all()) and bool(off <= WEIGHT_BOUND) and bool((sums > 0.5).any())
