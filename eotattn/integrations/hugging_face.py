"""Attach to the attention interface of Hugging Face transformers.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, V value width.

A model hands query, key and value to the function that its configuration names, and asks for masks from a second
function of the same name. Both are needed: with the first alone, every mask would become ``None`` without a word.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from eotattn.attention.statistics.score_rows import TensorRows
from eotattn.compat import (
    attention_implementation,
    forget_attention_implementation,
    names_attention_implementation,
    set_attention_implementation,
)
from eotattn.integrations.frames import is_cross_attention
from eotattn.integrations.interface_calls import as_call, mask_function, with_padding
from eotattn.integrations.lazy_mask import LazyMask
from eotattn.integrations.prior_interface import IMPLEMENTATION
from eotattn.integrations.recorder import Recorder

__all__ = ["configurations", "implementations", "listen"]

#: A model's own attention function: (module, query, key, value, mask, ...) -> (output (B, Q, H, V), weights).
OwnFunction = Callable[..., "tuple[Tensor, Tensor | None]"]
Content = tuple[Tensor, Tensor, Tensor]

#: Entries of one block of attention weights where the model's own function would make all of them.
ROW_BLOCK = 2**20


def configurations(model: nn.Module) -> list[Any]:
    """Every distinct configuration object of a module that calls the attention function which its configuration names.

    Other models compare the name with those that they know, so that ours would change what they compute.
    """
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if names_attention_implementation(config) and _calls_interface(type(module)):
            found.setdefault(id(config), config)
    return list(found.values())


def implementations(model: nn.Module) -> set[str]:
    """Names of the attention functions that the model's configurations name."""
    return {attention_implementation(config) or "eager" for config in configurations(model)}


def _calls_interface(kind: type) -> bool:
    """Whether a class, or one that it inherits from, is written beside a use of the attention interface."""
    homes = {base.__module__ for base in kind.__mro__} - {"transformers.modeling_utils"}
    return any("ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[home]) for home in homes)


@contextmanager
def listen(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Route every attention call of ``model`` through ``recorder``; the model's own functions still compute it."""
    configs = [config for config in configurations(model) if attention_implementation(config) != IMPLEMENTATION]
    if not configs:  # or attention that goes through prior_attention, whose calls are heard there
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
        AttentionMaskInterface.register(ours, mask_function(own, "capture"))
    if find is not None:  # newer releases name the model's own eager function here; older ones do not
        interface.get_interface = get_interface
    try:
        yield
    finally:
        if find is not None:
            interface.get_interface = find
        for ours in implementations:
            forget_attention_implementation(ours)


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
        if id(module) not in names:  # it shares the configuration of the model, and is not part of it
            return output, weights
        name = recorder.frames.layer_name(names[id(module)], query, key)
        if recorder.keeps(name):
            content, crosses = (query, key, value), is_cross_attention(name)
            call = as_call(module, implementation, content, attention_mask, arguments, crosses=crosses)
            call = replace(call, crosses=crosses, attend=lambda other: run(other)[0].transpose(1, 2))
            if not crosses:
                call = with_padding(call, attention_mask, recorder.frames.real_tokens)
                recorder.check_no_return(name, query.shape[0], call.query_start)
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
