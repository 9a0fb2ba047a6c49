"""Attach to :func:`eotattn.prior_attention`, so that content and prior of every score are told apart.

Legend: B batch, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eotattn.attention.backends import Backend, Served, answer
from eotattn.attention.call import AttentionCall
from eotattn.attention.call_positions import Positions
from eotattn.attention.observers import observe
from eotattn.attention.operands import lanes_of
from eotattn.attention.row_constants import row_constants
from eotattn.attention.statistics.score_rows import LaneRows, RowSource, TensorRows
from eotattn.checks import require
from eotattn.integrations.captured_call import CapturedCall
from eotattn.integrations.recorder import Recorder

__all__ = ["listen"]


@contextmanager
def listen(recorder: Recorder) -> Iterator[None]:
    """Record every :func:`eotattn.prior_attention` call inside a forward pass of the model."""

    def record(call: AttentionCall, backend: Backend, serve: Callable[[], Served]) -> Served:
        if not recorder.is_listening:
            return serve()
        remedy = "Capture one process on a shorter text"
        require(not call.is_shared, "capture", "model", "run outside of context_parallel", "a shard", remedy)
        with recorder.muted():
            served = serve()
        layer = recorder.frames.layer_name(recorder.frames.stack[-1].name, call.query, call.key)
        if recorder.keeps(layer):
            recorder.priors[layer] = call.prior
            plain = call if call.sinks is None else replace(call, sinks=call.sinks.without_values())

            def attend(value: Tensor) -> Tensor:
                return answer(replace(plain, value=value), backend).output

            captured = replace(_as_call(call), attend=attend)
            output = served.output if call.sinks is None or call.sinks.value is None else attend(call.value)
            recorder.record(layer, captured, None if call.dropout_p else output)
        return served

    with observe(record):
        yield


def _as_call(call: AttentionCall) -> CapturedCall:
    queries, keys = call.query.shape[2], call.key.shape[2]
    start = _first(call.query_positions)
    key_start = _first(call.key_positions)
    places: dict[str, Any] = {"query_start": keys - queries, "key_start": 0}
    if start is not None and key_start is not None:
        places = {"query_start": start, "key_start": key_start}
    padding = call.masks.padding
    if padding is not None and keys >= queries:
        real = ~padding
        places["counted"] = real[:, keys - queries :]
        places["sequence_start"] = real.int().argmax(-1) + places["key_start"]
    return CapturedCall(
        call.query,
        call.key,
        call.value,
        scale=call.scale,
        log_prior=_prior_rows(call),
        sink_logits=_sink_logits(call),
        **_admissible(call, places["query_start"] - places["key_start"]),
        **places,
    )


def _first(positions: Positions) -> int | None:
    """First position of consecutive ones that all samples share; ``None`` if they are not."""
    if positions.first is not None or positions.on_grid:
        return positions.first
    rows = positions.tensor.reshape(-1, positions.tensor.shape[-1])
    first = rows[0, 0]
    steps = torch.arange(rows.shape[-1], device=rows.device, dtype=rows.dtype)
    return int(first) if bool((rows == first + steps).all()) else None


def _sink_logits(call: AttentionCall) -> Tensor | None:
    """Those of the call's sinks, as far from the logits of the keys as they are in it, (B or 1, H, Q or 1)."""
    if call.sinks is None:
        return None
    logits = call.sinks.log_sum_exp(call.query, call.scale)
    left_out = row_constants(replace(call, cache=None)) if _reads_lanes(call) else None
    return logits if left_out is None else (logits - left_out).to(logits.dtype)


def _reads_lanes(call: AttentionCall) -> bool:
    """Whether statistics read the log-prior as lanes: their kernel does, as that of the output did."""
    return (call.prior is None or call.prior.has_lanes) and call.query.is_cuda


def _prior_rows(call: AttentionCall) -> RowSource | None:
    if not call.has_log_prior and call.query_bias is None:
        return None
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    if _reads_lanes(call):
        lanes = lanes_of(replace(call, scale=1.0, masks=replace(call.masks, key_bias=None)))
        return None if lanes is None else LaneRows(lanes)

    def rows(start: int, stop: int) -> Tensor:
        log_prior = call.log_prior(dtype, start, stop)
        assert log_prior is not None
        return log_prior

    return rows


def _admissible(call: AttentionCall, shift: int) -> dict[str, Any]:
    """Causality and window where positions say them, and rows of the mask for the rest."""
    masks, band = call.masks, call.masks.band
    known: dict[str, Any] = {}
    if band is not None and band.offset == shift and masks.documents is None:
        known, masks = {"is_causal": True, "window": band.window}, replace(masks, band=None)
    dense = masks.as_dense(call.query.shape[0], call.query.shape[2], call.key.shape[2], call.query.device)
    return {**known, "mask": None if dense is None else TensorRows(dense)}
