"""What a capture collects: one attention call at a time, checked against what the model itself computed.

Legend: B batch, N sequences, H query heads, Q queries, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from eotattn.attention.statistics import AttentionStatistics
from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.checks import check_indices, require
from eotattn.compat import in_backward_pass
from eotattn.diagnostics.grid_statistics import GridStatistics
from eotattn.diagnostics.value_statistics import ValueStatistics
from eotattn.integrations.captured_call import CapturedCall
from eotattn.integrations.certificates import call_certificate
from eotattn.integrations.value_probe import ValueProbe

__all__ = ["Recorder"]

OWNER = "capture"

#: Between the name of a module and the number of its pass, where it is several layers.
PASS = " (pass "
#: Rows of every call whose output is compared with the model's, and that are certified.
CHECKED_ROWS = 4
#: Largest admissible deviation of those rows, relative to the largest entry.
OUTPUT_BOUND = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Recorder:
    """Statistics by layer, in the order of the first call.

    Args:
        layers: Names or indices of the layers to keep; ``None`` for all.
        heads: Indices of the heads to keep; ``None`` for all.
        keys: Chosen keys, counted from the start of each sequence.
        on_rows: Called with (layer name, row statistics) after every call that is kept.
        certify: Whether the weights of the last rows of every call are certified.
        grid: Rows and columns of tokens, to collect lags in two axes as well.

    Attributes:
        statistics: Layer -> sums by sequence.
        values: Layer -> what its values do, where its output projection was seen.
        certificates: Layer -> (N, H) largest duality gap of the last rows of every call, nats.
        grids: Layer -> sums by lag in two axes.
    """

    def __init__(
        self,
        layers: Sequence[str | int] | None,
        heads: Sequence[int] | None,
        keys: tuple[int, ...],
        on_rows: Callable[[str, AttentionStatistics], None] | None,
        certify: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> None:
        self.wanted = None if layers is None else list(layers)
        self.heads = None if heads is None else list(heads)
        self.keys, self.on_rows, self.certify, self.grid = keys, on_rows, certify, grid
        self.value_probe = ValueProbe(keys[0], self.heads)
        self.certificates: dict[str, Tensor] = {}
        self.grids: dict[str, GridStatistics] = {}
        self.statistics: dict[str, SequenceStatistics] = {}
        self.seen: dict[str, int] = {}
        self.priors: dict[str, Any] = {}
        self.num_forwards = 0
        self.stack: list[str] = []
        self._repeats: dict[str, int] = {}
        self._outputs: dict[str, ref[Tensor]] = {}
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

    @property
    def values(self) -> dict[str, ValueStatistics]:
        """What values do, by layer, in the order of the layers."""
        found = self.value_probe.statistics
        return {name: found[name] for name in self.statistics if name in found}

    def enter(self, name: str, inputs: tuple[Any, ...]) -> None:
        """A module starts to run; one that reads its own last output is a further layer of shared weights."""
        if not self.stack:
            self.num_forwards += 1
            self._continuing = False
        last = self._outputs.get(name) if self.stack and inputs else None
        repeats = last is not None and last() is inputs[0]
        self._repeats[name] = self._repeats.get(name, 0) + 1 if repeats else 0
        self.stack.append(name)

    def leave(self, name: str, output: Any) -> None:
        """The module that runs returned ``output``."""
        self.stack.pop()
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            self._outputs[name] = ref(first)

    def layer_name(self, name: str) -> str:
        """The name of module ``name`` as a layer: with its number where modules around it run again and again."""
        repeats = sum(self._repeats[module] for module in self.stack)
        return f"{name}{PASS}{repeats + 1})" if repeats else name

    def keeps(self, name: str) -> bool:
        """Whether this layer is wanted; numbers layers as they first appear.

        What runs within a backward pass is recomputed from a checkpoint, and was recorded before.
        """
        if in_backward_pass():
            return False
        index = self.seen.setdefault(name, len(self.seen))
        return self.wanted is None or not {name, name.partition(PASS)[0], index}.isdisjoint(self.wanted)

    def continues(self, name: str, batch: int, start: int) -> bool:
        """Whether queries from ``start`` on follow the last call of layer ``name``: decoding with a cache."""
        return start > 0 and self._next.get(name) == (batch, start)

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
            follows = self._accumulate(name, call, SequenceStatistics.of(rows))
            if output is not None and not follows:
                self.value_probe.offer(name, call, output, rows.key_mass[..., 0])
            if self.certify and output is not None:
                self._certify(name, call)
            if self.grid is not None:
                self._add_grid(name, call, self.grid)

    def _add_grid(self, name: str, call: CapturedCall, grid: tuple[int, int]) -> None:
        plain = call.sink_logits is None
        require(plain, OWNER, "grid", "meet no explicit sink", name, "Rows must sum to one")
        new = GridStatistics.of(call.source(torch.promote_types(call.query.dtype, torch.float32)), *grid)
        new = new if self.heads is None else new.heads(self.heads)
        self.grids[name] = self.grids[name] + new if name in self.grids else new

    def _certify(self, name: str, call: CapturedCall) -> None:
        with self.muted():
            gaps = call_certificate(call, rows=CHECKED_ROWS)
        if gaps is not None:
            gaps = gaps if self.heads is None else gaps[:, self.heads]
            old = self.certificates.get(name)
            self.certificates[name] = gaps if old is None else torch.cat([old, gaps])

    def _accumulate(self, name: str, call: CapturedCall, new: SequenceStatistics) -> bool:
        """Add ``new``; return whether it continues sequences that are there."""
        if self.heads is not None:
            where = f" of layer {name!r}"
            new = new.heads(check_indices(OWNER, "heads", self.heads, new.num_heads, where=where))
        batch, start = call.query.shape[0], call.query_start
        follows = self.continues(name, batch, start)
        self._continuing = self._continuing or follows
        old = self.statistics.get(name)
        follows = follows or (self._continuing and call.query.shape[2] == 1)
        follows = follows and old is not None and old.num_sequences >= batch
        if old is None:
            self.statistics[name] = new
        else:
            self.statistics[name] = old.continued(new) if follows else old + new
        self._next[name] = (batch, start + call.query.shape[2])
        return follows

    def _compare(self, name: str, call: CapturedCall, output: Tensor) -> None:
        """Raise unless the statistics describe the attention that the model computed."""
        tail = call.tail(CHECKED_ROWS)
        rows = tail.statistics(self.keys, with_output=True)
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
