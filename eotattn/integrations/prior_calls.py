"""Attach to :func:`eotattn.prior_attention`, so that content and prior of every score are told apart.

Legend: B batch, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from eotattn.attention.backends import Backend
from eotattn.attention.call import AttentionCall
from eotattn.attention.call_positions import Positions
from eotattn.attention.observers import Served, observe
from eotattn.attention.operands import lanes_of
from eotattn.attention.statistics.score_rows import LaneRows, RowSource, TensorRows
from eotattn.integrations.captured_call import CapturedCall
from eotattn.integrations.recorder import Recorder

__all__ = ["listen"]


@contextmanager
def listen(recorder: Recorder) -> Iterator[None]:
    """Record every :func:`eotattn.prior_attention` call inside a forward pass of the model."""

    def record(call: AttentionCall, backend: Backend, serve: Callable[[], Served]) -> Served:
        if not recorder.is_listening:
            return serve()
        with recorder.muted():
            served = serve()
        layer = recorder.frames.layer_name(recorder.frames.stack[-1].name, call.query, call.key)
        if recorder.keeps(layer):
            recorder.priors[layer] = call.prior
            captured = replace(_as_call(call), attend=lambda value: backend.run(replace(call, value=value)).output)
            recorder.record(layer, captured, None if call.dropout_p else served.output)
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


def _prior_rows(call: AttentionCall) -> RowSource | None:
    prior = call.prior
    if prior is None:
        return None
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    positions, keys = call.query_positions.tensor, call.key_positions.tensor
    if prior.has_lanes and call.query.is_cuda:  # the kernel of statistics reads lanes, as that of the output did
        lanes = lanes_of(replace(call, scale=1.0))
        return None if lanes is None else LaneRows(lanes)
    axis = -1 if prior.num_coordinates == 1 else -2
    return lambda start, stop: prior.dense(positions.narrow(axis, start, stop - start), keys, dtype=dtype)


def _admissible(call: AttentionCall, shift: int) -> dict[str, Any]:
    """Causality and window where positions say them, and rows of the mask for the rest."""
    masks, band = call.masks, call.masks.band
    if band is not None and band.offset == shift and masks.documents is None:
        rows = None if masks.padding is None else TensorRows(~masks.padding[:, None, None, :])
        return {"is_causal": True, "window": band.window, "mask": rows}
    dense = masks.as_dense(call.query.shape[0], call.query.shape[2], call.key.shape[2], call.query.device)
    return {"mask": None if dense is None else TensorRows(dense)}
