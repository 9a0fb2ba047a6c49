"""From ``nn.MultiheadAttention`` to the layer of the house: its arguments, its inputs, its weights.

Legend: B batch, E model width, H heads, D head width.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from eotattn.attention.attention_sinks import AttentionSinks
from eotattn.checks import fail

__all__ = ["NO_FUSED_ENCODER", "as_batch", "as_positions", "multihead_arguments", "multihead_state"]


def multihead_arguments(attention: nn.MultiheadAttention) -> dict[str, Any]:
    """Arguments with which :class:`~eotattn.attention.PriorAttention` has the same parameters and layout."""
    packed, weight = attention._qkv_same_embed_dim, attention.out_proj.weight
    return {
        "embed_dim": attention.embed_dim,
        "num_heads": attention.num_heads,
        "kdim": None if packed else attention.kdim,
        "vdim": None if packed else attention.vdim,
        "dropout": attention.dropout,
        "bias": attention.in_proj_bias is not None,
        "sinks": _multihead_sinks(attention),
        "batch_first": attention.batch_first,
        "device": weight.device,
        "dtype": weight.dtype,
    }


def multihead_state(attention: nn.MultiheadAttention) -> dict[str, Tensor]:
    """The weights of ``attention`` under the names of a ``PriorAttention`` made with :func:`multihead_arguments`."""
    state = dict(attention.state_dict())
    bias = state.pop("in_proj_bias", None)
    named = {name: tensor for name, tensor in state.items() if name.startswith("out_proj.")}
    if attention._qkv_same_embed_dim:
        named["in_proj.weight"] = state["in_proj_weight"]
        return named if bias is None else {**named, "in_proj.bias": bias}
    for k, side in enumerate(("query", "key", "value")):
        named[f"in_proj.{side}.weight"] = state[f"{side[0]}_proj_weight"]
        if bias is not None:
            named[f"in_proj.{side}.bias"] = bias.chunk(3)[k]
    return named


def _multihead_sinks(attention: nn.MultiheadAttention) -> AttentionSinks | None:
    """What ``add_bias_kv`` and ``add_zero_attn`` put beside the tokens."""
    shape = (attention.num_heads, 1, -1)
    key, value = (None if side is None else side.view(shape) for side in (attention.bias_k, attention.bias_v))
    if key is None and not attention.add_zero_attn:
        return None
    return AttentionSinks(has_zero_key=attention.add_zero_attn, key=key, value=value)


class _NoFusedEncoder:
    """Stands where ``nn.TransformerEncoder`` reads a packed weight, and turns it to the layer's own forward.

    The encoder takes its fused path only where no argument overrides PyTorch's functions; this one does.
    """

    @classmethod
    def __torch_function__(cls, *arguments: Any, **keywords: Any) -> Any:
        return NotImplemented


NO_FUSED_ENCODER = _NoFusedEncoder()


def as_batch(
    query: Tensor, key: Tensor, value: Tensor, *, is_batched: bool, batch_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs as (B, length, width), keeping identities, so that self-attention is still seen as such."""

    def arranged(tensor: Tensor) -> Tensor:
        if not is_batched:
            return tensor.unsqueeze(0)
        return tensor if batch_first or tensor.dim() != 3 else tensor.transpose(0, 1)

    first = arranged(query)
    second = first if key is query else arranged(key)
    return first, second, second if value is key else arranged(value)


def as_positions(owner: str, argument: str, positions: Any, tokens: Tensor) -> Any:
    """Positions of (B, L, width) tokens as a tensor, a ``range`` or ``None``; a number is that of the first token."""
    if positions is None or isinstance(positions, (Tensor, range)):
        return positions
    if isinstance(positions, Integral) and not isinstance(positions, bool):
        return range(int(positions), int(positions) + tokens.shape[1])
    rule, remedy = "be numbers: a tensor, an array, a list, a range, or that of the first token", "One position a token"
    try:
        return torch.as_tensor(positions, device=tokens.device)
    except (TypeError, ValueError, RuntimeError):
        fail(owner, argument, rule, positions, remedy, error=TypeError)
