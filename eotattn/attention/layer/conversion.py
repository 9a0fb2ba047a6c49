"""From ``nn.MultiheadAttention`` to the layer of the house: its arguments, its inputs, its weights.

Legend: B batch, E model width, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["as_batch", "copy_weights", "multihead_arguments"]


def multihead_arguments(attention: nn.MultiheadAttention) -> dict[str, Any]:
    """Arguments with which :class:`~eotattn.attention.PriorAttention` has the same parameters."""
    packed, weight = attention._qkv_same_embed_dim, attention.out_proj.weight
    return {
        "embed_dim": attention.embed_dim,
        "num_heads": attention.num_heads,
        "kdim": None if packed else attention.kdim,
        "vdim": None if packed else attention.vdim,
        "dropout": attention.dropout,
        "bias": attention.in_proj_bias is not None,
        "add_bias_kv": attention.bias_k is not None,
        "add_zero_attn": attention.add_zero_attn,
        "batch_first": attention.batch_first,
        "device": weight.device,
        "dtype": weight.dtype,
    }


def copy_weights(attention: nn.MultiheadAttention, layer: Any) -> None:
    """Copy the weights of ``attention`` into a ``PriorAttention`` made with :func:`multihead_arguments`."""
    state = attention.state_dict()
    layer.in_proj.load_multihead(state)
    layer.out_proj.load_state_dict({k[9:]: v for k, v in state.items() if k.startswith("out_proj.")}, strict=False)
    if attention.bias_k is not None and attention.bias_v is not None:
        with torch.no_grad():
            for ours, theirs in ((layer.appended.key, attention.bias_k), (layer.appended.value, attention.bias_v)):
                ours.copy_(theirs.view(attention.num_heads, 1, -1))


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
