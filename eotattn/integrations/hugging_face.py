"""Attach to the attention interface of Hugging Face transformers.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, V value width.

A model hands query, key and value to the function that its configuration names, and asks for masks from a second
function of the same name. Both are needed: with the first alone, every mask would become ``None`` without a word.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from eotattn.attention.statistics.score_rows import RowSource, TensorRows
from eotattn.compat import (
    attention_implementation,
    forget_attention_implementation,
    names_attention_implementation,
    set_attention_implementation,
)
from eotattn.integrations.captured_call import CapturedCall
from eotattn.integrations.lazy_mask import LazyMask
from eotattn.integrations.mask_functions import causal_window
from eotattn.integrations.recorder import Recorder

__all__ = ["configurations", "listen"]

#: A model's own attention function: (module, query, key, value, mask, ...) -> (output (B, Q, H, V), weights).
OwnFunction = Callable[..., "tuple[Tensor, Tensor | None]"]
Content = tuple[Tensor, Tensor, Tensor]

#: Entries of one block of attention weights where the model's own function would make all of them.
ROW_BLOCK = 2**20
#: Attention whose queries and keys belong to different sequences, by the names that models give it.
CROSS = re.compile(r"cross|encoder_attn|encdecattention", re.IGNORECASE)


def configurations(model: nn.Module) -> list[Any]:
    """Every distinct configuration object of the model that names an attention implementation."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and names_attention_implementation(config):
            found.setdefault(id(config), config)
    return list(found.values())


@contextmanager
def listen(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Route every attention call of ``model`` through ``recorder``; the model's own functions still compute it."""
    configs = configurations(model)
    if not configs:
        yield
        return
    names = {id(module): name for name, module in model.named_modules()}
    before = [attention_implementation(config) for config in configs]
    prefix = f"eotattn_{id(recorder):x}_"
    try:
        with _registered({prefix + (own or "eager"): own or "eager" for own in before}, recorder, names):
            for config, own in zip(configs, before, strict=True):
                set_attention_implementation(config, prefix + (own or "eager"))
            yield
    finally:
        for config, own in zip(configs, before, strict=True):
            set_attention_implementation(config, own)


@contextmanager
def _registered(implementations: dict[str, str], recorder: Recorder, names: dict[int, str]) -> Iterator[None]:
    """Both functions of every implementation (our name -> the model's own), while the block runs."""
    from transformers import AttentionInterface, AttentionMaskInterface

    interface: Any = AttentionInterface
    find: Any = getattr(interface, "get_interface", None)

    def get_interface(self: Any, attn_implementation: str, default: OwnFunction) -> OwnFunction:
        own = implementations.get(attn_implementation)
        if own is None:
            return find(self, attn_implementation, default)
        return _attention_function(own, recorder, names, find(self, own, default))

    for ours, own in implementations.items():
        AttentionInterface.register(ours, _attention_function(own, recorder, names, None))
        AttentionMaskInterface.register(ours, _mask_function(own))
    if find is not None:  # newer releases name the model's own eager function here; older ones do not
        interface.get_interface = get_interface
    try:
        yield
    finally:
        if find is not None:
            interface.get_interface = find
        for ours in implementations:
            forget_attention_implementation(ours)


def _mask_function(implementation: str) -> Callable[..., Tensor | None]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    make = ALL_MASK_ATTENTION_FUNCTIONS[implementation]

    def mask(**arguments: Any) -> Tensor | None:
        if not {"batch_size", "q_length", "kv_length"} <= set(arguments):
            raise NotImplementedError(
                f"capture: this release of transformers describes masks by {sorted(arguments)}, not by batch_size, "
                f"q_length and kv_length. Use the release that the extra 'analysis' names."
            )
        additive = implementation == "eager"
        for name in ("q_offset", "kv_offset"):  # a cache of fixed size counts in a tensor, and goes on counting
            if isinstance(arguments.get(name), Tensor):
                arguments[name] = arguments[name].clone()
        return LazyMask(make, sdpa_mask, arguments, arguments.get("dtype", torch.float32) if additive else torch.bool)

    return mask


def _attention_function(
    implementation: str, recorder: Recorder, names: dict[int, str], function: OwnFunction | None
) -> OwnFunction:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        own = function or _own_function(module, implementation)

        def run(value: Tensor) -> tuple[Tensor, Tensor | None]:
            with recorder.muted():
                if implementation == "eager":
                    return _run_by_rows(own, module, (query, key, value), attention_mask, arguments)
                mask = attention_mask.original() if isinstance(attention_mask, LazyMask) else attention_mask
                return own(module, query, key, value, mask, **arguments)

        output, weights = run(value)
        name = recorder.layer_name(names.get(id(module), type(module).__name__))
        if recorder.keeps(name):
            content, crosses = (query, key, value), bool(CROSS.search(name))
            call = _as_call(module, implementation, content, attention_mask, arguments, crosses=crosses)
            call = replace(call, attend=lambda other: run(other)[0].transpose(1, 2))
            dropped = module.training and bool(arguments.get("dropout"))
            recorder.record(name, call, None if dropped else output.transpose(1, 2))
        return output, weights

    return attention


def _own_function(module: nn.Module, implementation: str) -> OwnFunction:
    """The function that the model would have called, where the interface does not say."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    home = vars(sys.modules[type(module).__module__])
    if implementation != "eager":
        return home.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[implementation]
    eager = [value for name, value in home.items() if name.endswith("eager_attention_forward")]
    if len(eager) == 1:
        return eager[0]
    raise NotImplementedError(
        f"capture: {type(module).__name__} has {len(eager)} eager functions beside it, so its own attention cannot be "
        f"named. Load the model with attn_implementation='sdpa'."
    )


def _run_by_rows(
    function: OwnFunction, module: nn.Module, content: Content, mask: Tensor | None, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Call the model's own function, in blocks of rows where it would make a large Q x K table; weights then go."""
    query, key, value = content
    batch, heads, queries, _ = query.shape
    rows = max(1, ROW_BLOCK // (batch * heads * key.shape[2]))
    if rows >= queries or arguments.get("dropout"):
        whole = mask.elements() if isinstance(mask, LazyMask) else mask
        return function(module, query, key, value, whole, **arguments)
    output: Tensor | None = None
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        part = dict(arguments)
        if part.get("position_bias") is not None:
            part["position_bias"] = TensorRows(part["position_bias"])(start, stop)
        masked = mask.original_rows(start, stop) if isinstance(mask, LazyMask) else _rows_of(mask, start, stop)
        rows_output = function(module, query[:, :, start:stop], key, value, masked, **part)[0]
        if output is None:  # one tensor from the start: small ones between large ones would keep memory from reuse
            output = rows_output.new_empty(batch, queries, *rows_output.shape[2:])
        output[:, start:stop] = rows_output
    assert output is not None
    return output, None


def _rows_of(mask: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if mask is None else TensorRows(mask)(start, stop)


def _as_call(
    module: nn.Module,
    implementation: str,
    content: Content,
    mask: Tensor | None,
    arguments: dict[str, Any],
    *,
    crosses: bool,
) -> CapturedCall:
    """The call in our terms."""
    query, key, value = content
    queries, keys = query.shape[2], key.shape[2]
    bias, sink = arguments.get("position_bias"), arguments.get("s_aux")
    call = CapturedCall(
        query,
        key,
        value,
        scale=arguments.get("scaling"),
        softcap=arguments.get("softcap"),
        log_prior=None if bias is None else _cropped(TensorRows(bias), keys),
        sink_logits=None if sink is None else sink.flatten(),
    )
    if isinstance(mask, LazyMask):
        places = {} if crosses else _places(mask, queries)
        return replace(call, **places, **_pattern(mask, keys))
    if mask is not None and mask.dim() == 2:
        mask = mask.bool()[:, None, None, :]
    causal = arguments.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    causal = bool(causal) and mask is None and queries > 1 and implementation != "eager"
    rows = None if mask is None else _cropped(TensorRows(mask), keys)
    shift = keys - queries if causal or (mask is not None and not crosses) else 0
    if causal and implementation == "sdpa":
        shift = 0  # query i sees keys 0 to i there
    return replace(call, mask=rows, is_causal=causal, query_start=max(0, shift))


def _places(mask: LazyMask, queries: int) -> dict[str, Any]:
    """Positions, padding and the start of each sequence, from what the model said when it asked for the mask."""
    start, padding = int(mask.arguments.get("q_offset", 0)), mask.arguments.get("attention_mask")
    places: dict[str, Any] = {"query_start": start, "key_start": int(mask.arguments.get("kv_offset", 0))}
    if padding is not None and padding.dim() == 2 and padding.shape[-1] >= start + queries:
        real = padding.bool()
        places["counted"] = real[:, start : start + queries]
        places["sequence_start"] = real.int().argmax(-1)
    return places


def _pattern(mask: LazyMask, keys: int) -> dict[str, Any]:
    """Causality, window and padding where the mask is no more than that, else its rows."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    function, padding = mask.arguments.get("mask_function", causal_mask_function), mask.arguments.get("attention_mask")
    window = causal_window(function)
    is_plain = function in (causal_mask_function, bidirectional_mask_function) or window is not None
    if not is_plain or mask.shape[-1] != keys or (padding is not None and padding.shape != (mask.shape[0], keys)):
        return {"mask": _cropped(mask.rows, keys)}
    real = None if padding is None or bool(padding.all()) else padding.bool()[:, None, None, :]
    rows = None if real is None else TensorRows(real)
    is_causal = function is causal_mask_function or window is not None
    return {"mask": rows, "is_causal": is_causal, "window": window}


def _cropped(rows: RowSource, keys: int) -> RowSource:
    """Static caches have longer masks than keys."""
    return lambda start, stop: rows(start, stop)[..., :keys]
