"""The attention function ``"eotattn"`` of Hugging Face transformers: a model's attention through ``prior_attention``.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eotattn.attention import AttentionSinks, prior_attention
from eotattn.checks import check_installed
from eotattn.integrations.captured_call import CapturedCall
from eotattn.integrations.interface_calls import as_call, mask_function, with_padding
from eotattn.integrations.lazy_mask import LazyMask
from eotattn.priors import LogPrior
from eotattn.priors.memory import constants

__all__ = ["ATTRIBUTE", "IMPLEMENTATION", "LayerChange", "layer_change", "layer_changes", "register_attention"]

#: The name that configurations give to the attention function.
IMPLEMENTATION = "eotattn"
#: Where an attention module keeps its :class:`LayerChange`.
ATTRIBUTE = "eotattn"
#: What ``torch.compile(model, fullgraph=True)`` says.
NO_FULL_GRAPH = "attach: masks that say where tokens are have no graph. Compile the model with fullgraph=False."
#: Keywords of attention functions that choose keys in ways that no mask, bias or sink states.
UNKNOWN = ("indices", "block_indices", "block_table", "cache", "head_mask", "sinks")


class LayerChange(nn.Module):
    """What changes the attention of one layer.

    Args:
        prior: Added to the scores of its H heads.
        sinks: What queries may attend to instead of keys.
        positional: Heads whose content is left out: they attend by the prior alone.
    """

    def __init__(
        self, prior: LogPrior | None = None, sinks: AttentionSinks | None = None, positional: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.prior, self.sinks, self.positional = prior, sinks, positional

    def kept(self, by_head: Tensor) -> Tensor:
        """Content (B, H, Q, ...) of the heads that have one, and zeros."""
        if not self.positional:
            return by_head
        factors = tuple(0.0 if head in self.positional else 1.0 for head in range(by_head.shape[1]))
        return by_head * constants(factors, by_head.device, by_head.dtype)[:, None, None]

    def all_sinks(self, own: Tensor | None) -> AttentionSinks | Tensor | None:
        """Its sinks and those (H,) that the model itself has."""
        if self.sinks is None or own is None:
            return own if self.sinks is None else self.sinks
        if self.sinks.logits is None or self.sinks.key is not None or self.sinks.has_zero_key:
            raise NotImplementedError(
                "attach: sinks must be logits alone on a model that has sinks of its own; got other kinds. Pass "
                "AttentionSinks.logit(num_heads)."
            )
        return torch.logaddexp(own.float(), self.sinks.logits.float())


def layer_change(module: nn.Module) -> LayerChange | None:
    """What was attached to an attention module."""
    return getattr(module, ATTRIBUTE, None)


def layer_changes(model: nn.Module) -> dict[str, LayerChange]:
    """Layer -> what was attached to it."""
    found = {name: layer_change(module) for name, module in model.named_modules()}
    return {name: change for name, change in found.items() if change is not None}


def register_attention() -> str:
    """Make ``attn_implementation="eotattn"`` known to Hugging Face transformers; a second call changes nothing.

    Models that are loaded with that name run their attention through :func:`eotattn.prior_attention`, without a prior
    until :func:`eotattn.integrations.attach` gives them one.

    Returns:
        The name.

    Raises:
        ModuleNotFoundError: If transformers is not installed.
    """
    check_installed("register_attention", "analysis", "transformers")
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
    mask = torch.compiler.disable(mask_function("sdpa", "attach"), reason=NO_FULL_GRAPH)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)
    return IMPLEMENTATION


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """Serve one call of the attention interface: output (B, Q, H, V), and weights where they are asked for."""
    _check_understood(module, arguments)
    change = layer_change(module)
    call = as_call(module, "sdpa", (query, key, value), attention_mask, arguments, crosses=False)
    options: dict[str, Any] = {
        "dropout_p": float(arguments.get("dropout") or 0.0),
        "return_weights": bool(arguments.get("output_attentions")),
        "is_causal": call.is_causal,
        "window": call.window,
        "query_positions": call.query_start,
        "key_positions": call.key_start,
        "sinks": call.sink_logits,
    }
    if change is not None:
        _check_places(module, call, attention_mask, change)
        options |= {
            "prior": change.prior,
            "sinks": change.all_sinks(call.sink_logits),
            **_from_first_tokens(call, attention_mask),
        }
    result = prior_attention(**_content(call, change), **options)
    output, weights = result if isinstance(result, tuple) else (result, None)
    return output.transpose(1, 2).contiguous(), weights


def _content(call: CapturedCall, change: LayerChange | None) -> dict[str, Any]:
    """Query, key, value, scale and mask; scores that are no inner products are part of the mask."""
    query, key, queries = call.query, call.key, call.query.shape[2]
    mask = None if call.mask is None else call.mask(0, queries)
    bias = None if call.log_prior is None else call.log_prior(0, queries)
    if change is not None:
        query, bias = change.kept(query), None if bias is None else change.kept(bias)
    scale = query.shape[-1] ** -0.5 if call.scale is None else float(call.scale)
    if call.softcap is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        grouped = query.to(wide).unflatten(1, (key.shape[1], -1))
        score = (scale * grouped @ key.to(wide).unsqueeze(2).mT).flatten(1, 2)
        score = call.softcap * torch.tanh(score / call.softcap)
        bias = score if bias is None else score + bias
        query, key, scale = query.new_zeros(*query.shape[:3], 1), key.new_zeros(*key.shape[:3], 1), 1.0
    content: dict[str, Any] = {"query": query, "key": key, "value": call.value, "scale": scale}
    if bias is not None:
        bias = bias.expand(*bias.shape[:2], queries, key.shape[2])
        mask = (
            bias if mask is None else torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
        )
    return content | {"attn_mask": mask}


def _from_first_tokens(call: CapturedCall, mask: Tensor | None) -> dict[str, Any]:
    """Positions counted from the first token of every sequence that is not padding, where some come later."""
    start = with_padding(call, mask, lambda batch: _flat_padding(mask, batch)).sequence_start
    if start is None or not bool((start > 0).any()):
        return {}
    at = torch.arange(call.key_start, call.key_start + call.key.shape[2], device=call.query.device)
    here = torch.arange(call.query_start, call.query_start + call.query.shape[2], device=call.query.device)
    return {"query_positions": here - start[:, None], "key_positions": at - start[:, None]}


def _flat_padding(mask: Tensor | None, batch: int) -> Tensor | None:
    """(B, K) of a mask that is no more than padding."""
    return mask.bool() if mask is not None and mask.dim() == 2 and mask.shape[0] == batch else None


def _check_understood(module: nn.Module, arguments: dict[str, Any]) -> None:
    named = [name for name in UNKNOWN if arguments.get(name) is not None]
    if named:
        raise NotImplementedError(
            f"attach: {type(module).__name__} passes {', '.join(named)} to its attention, which prior_attention cannot "
            f"carry. Leave this model its own attention."
        )


def _check_places(module: nn.Module, call: CapturedCall, mask: Tensor | None, change: LayerChange) -> None:
    """A prior needs positions: of a cache, what the model said when it asked for its mask tells them."""
    if call.softcap is not None and change.sinks is not None and change.sinks.key is not None:
        raise NotImplementedError(
            f"attach: sinks must have no keys where {type(module).__name__} caps its scores; got keys. Pass logits."
        )
    if change.prior is not None and not isinstance(mask, LazyMask) and call.query.shape[2] != call.key.shape[2]:
        raise NotImplementedError(
            f"attach: {type(module).__name__} attends {call.query.shape[2]} queries to {call.key.shape[2]} keys "
            f"under a mask of its own, so that their positions are not known to a prior. Attach to other layers."
        )
