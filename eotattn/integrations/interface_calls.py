"""One call of the attention interface of Hugging Face transformers, and its mask, in our terms.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from eotattn.attention.statistics.score_rows import RowSource, TensorRows
from eotattn.integrations.captured_call import CapturedCall
from eotattn.integrations.lazy_mask import LazyMask
from eotattn.integrations.mask_functions import causal_window

__all__ = ["as_call", "mask_function", "with_padding"]

Content = tuple[Tensor, Tensor, Tensor]


def mask_function(implementation: str, owner: str) -> Callable[..., Tensor | None]:
    """The mask function of an implementation, as recipes that make no element until someone asks for it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    make = ALL_MASK_ATTENTION_FUNCTIONS[implementation]

    def mask(**arguments: Any) -> Tensor | None:
        if not {"batch_size", "q_length", "kv_length"} <= set(arguments):
            raise NotImplementedError(
                f"{owner}: this release of transformers describes masks by {sorted(arguments)}, not by batch_size, "
                f"q_length and kv_length. Use the release that the extra 'analysis' names."
            )
        additive = implementation == "eager"
        for name in ("q_offset", "kv_offset"):  # a cache of fixed size counts in a tensor, and goes on counting
            if isinstance(arguments.get(name), Tensor):
                arguments[name] = arguments[name].clone()
        return LazyMask(make, sdpa_mask, arguments, arguments.get("dtype", torch.float32) if additive else torch.bool)

    return mask


def as_call(
    module: nn.Module,
    implementation: str,
    content: Content,
    mask: Tensor | None,
    arguments: dict[str, Any],
    *,
    crosses: bool,
) -> CapturedCall:
    """The call, causal and masked as the function of ``implementation`` would read it."""
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
        places: dict[str, Any] = {} if crosses else _places(mask, queries, keys)
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


def _places(mask: LazyMask, queries: int, keys: int) -> dict[str, int]:
    """Positions, from what the model said when it asked for the mask; where that is not known, queries come last.

    Of a cache whose first layer holds no keys, and of keys that are put before the tokens of an encoder, it is not.
    """
    from transformers.masking_utils import bidirectional_mask_function

    start, key_start = (int(mask.arguments.get(name, 0)) for name in ("q_offset", "kv_offset"))
    unknown = mask.shape[-1] < keys or mask.arguments.get("mask_function") is bidirectional_mask_function
    return {"query_start": key_start + max(0, keys - queries) if unknown else start, "key_start": key_start}


def with_padding(call: CapturedCall, mask: Tensor | None, told: Callable[[int], Tensor | None]) -> CapturedCall:
    """The call with the padding that the mask was asked for with, or else that ``told(batch)`` names, (B, L)."""
    start, queries = call.query_start, call.query.shape[2]
    padding = mask.arguments.get("attention_mask") if isinstance(mask, LazyMask) else None
    padding = told(call.query.shape[0]) if padding is None else padding
    if padding is None or padding.dim() != 2 or padding.shape[-1] < start + queries:
        return call
    real = padding.bool()
    return replace(call, counted=real[:, start : start + queries], sequence_start=real.int().argmax(-1))


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
