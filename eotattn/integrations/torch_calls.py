"""Attach to models that call PyTorch's attention: ``scaled_dot_product_attention`` and ``nn.MultiheadAttention``.

Legend: B batch, H query heads, Q queries, K keys, D score width, V value width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from eotattn.attention.statistics.score_rows import TensorRows, split_table
from eotattn.integrations.captured_call import CapturedCall
from eotattn.integrations.recorder import Recorder

__all__ = ["TorchCalls"]

NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class TorchCalls(TorchFunctionMode):
    """While active, every fused attention call inside a forward pass of the model is recorded.

    ``nn.MultiheadAttention`` that returns weights makes no fused call; it is asked a second time without weights, so
    that it makes one. Its own result is what the model gets.

    Args:
        recorder: Where statistics go.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``; record it if it is attention."""
        kwargs = kwargs or {}
        if not self.recorder.is_listening:
            return func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return self._fused(func, None, *args, **kwargs)
        if func is functional.multi_head_attention_forward:
            return self._multi_head(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _fused(self, func: Callable[..., Tensor], real: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        output = func(*args, **kwargs)
        call = {**dict(zip(NAMES, args, strict=False)), **kwargs}
        dropped = call.get("dropout_p", 0.0) > 0

        def attend(value: Tensor) -> Tensor:
            return _with_heads(func(**{**call, "value": value.view(call["value"].shape)}))

        captured, frames = replace(_as_call(call), attend=attend), self.recorder.frames
        name = frames.layer_name(frames.stack[-1].name, call["query"], call["key"])
        earlier = captured.key.shape[2] - captured.query.shape[2]
        if not captured.is_causal and self.recorder.continues(name, captured.query.shape[0], earlier):
            captured = replace(captured, query_start=earlier)  # a cache holds the keys of before
        real = _real_tokens(captured) if real is None else real
        if real is not None:
            captured = replace(captured, counted=real, sequence_start=real.int().argmax(-1))
        self.recorder.record(name, captured, None if dropped else _with_heads(output))
        return output

    def _multi_head(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        real = _unpadded(given.arguments)
        if given.arguments["need_weights"]:
            result = func(*args, **kwargs)
            given.arguments.update(need_weights=False, training=False)
            with torch.no_grad(), self._within(real):
                func(*given.args, **given.kwargs)
        else:
            with self._within(real):
                result = func(*args, **kwargs)
        if self.recorder.value_probe is not None:
            self.recorder.value_probe.projected(given.arguments["out_proj_weight"].detach())
        return result

    @contextmanager
    def _within(self, real: Tensor | None) -> Iterator[None]:
        """Record the fused call inside ``multi_head_attention_forward``, where a mode cannot see it."""
        fused = functional.scaled_dot_product_attention
        functional.scaled_dot_product_attention = partial(self._fused, fused, real)
        try:
            yield
        finally:
            functional.scaled_dot_product_attention = fused


def _with_heads(content: Tensor) -> Tensor:
    """(B, H, L, width) of whatever leading axes there are."""
    if content.dim() < 4:
        return content[(None,) * (3 - content.dim())].unsqueeze(1)
    return content.flatten(0, -4)


def _as_call(given: dict[str, Any]) -> CapturedCall:
    query, key, value = (_with_heads(given[name]) for name in ("query", "key", "value"))
    mask = given.get("attn_mask")
    if mask is not None:
        leading = given["query"].shape[:-2]
        mask = _with_heads(mask.expand(*leading, *mask.shape[-2:]) if mask.dim() > 2 else mask)
    decodes = mask is not None and query.shape[2] < key.shape[2]
    return CapturedCall(
        query,
        key,
        value,
        scale=given.get("scale"),
        mask=None if mask is None else TensorRows(mask),
        is_causal=bool(given.get("is_causal", False)),
        query_start=key.shape[2] - query.shape[2] if decodes else 0,
    )


def _unpadded(given: dict[str, Any]) -> Tensor | None:
    """(B, Q) true at tokens of self-attention that ``multi_head_attention_forward`` was not told to be padding."""
    padding = given["key_padding_mask"]
    if padding is None or given["query"] is not given["key"]:
        return None
    real = ~padding if padding.dtype == torch.bool else split_table(padding, padding.dtype)[1]
    return real[None] if real.dim() == 1 else real


def _real_tokens(call: CapturedCall) -> Tensor | None:
    """(B, Q) true at tokens that a mask of keys alone admits, where queries and keys are the same in number."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    rows = None if call.mask is None else call.mask(0, queries)
    if rows is None or rows.shape[2] != 1 or queries != keys or queries == 1:
        return None
    _, seen = split_table(rows, call.query.dtype)
    return seen[:, :, 0].any(1).expand(call.query.shape[0], keys)
