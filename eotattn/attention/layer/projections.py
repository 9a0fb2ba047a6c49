"""From inputs to the flat query, key and value of all heads.

Legend: B batch, L tokens, W width of all heads together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.compat import has_forward_hooks

__all__ = ["SeparateProjections", "project_packed", "reset_projection"]


def project_packed(
    linear: nn.Module, widths: tuple[int, int, int], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, ...]:
    """Query, key and value (B, L, W) out of the one matrix of ``linear``, whose output is ``widths`` side by side.

    Self-attention, told by identity, is a single product. Otherwise each input meets its own rows; where something
    else than the weight makes the output (an adapter, quantised or sharded weights, a hook that loads them), it is
    called as it is and the columns wanted are taken.
    """

    def whole(x: Tensor) -> tuple[Tensor, ...]:
        return linear(x).split_with_sizes(widths, dim=-1)

    if key is query and value is query:
        return linear(query).split_with_sizes(widths, dim=-1)
    if _is_its_weight(linear):
        weights, inputs = linear.get_parameter("weight").split(widths), (query, key, value)
        biases = (None,) * 3 if linear.bias is None else linear.get_parameter("bias").split(widths)
        return tuple(functional.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
    of_key = whole(key)
    return whole(query)[0], of_key[1], (of_key if value is key else whole(value))[2]


def _is_its_weight(linear: nn.Module) -> bool:
    """Whether calling a layer is multiplying with its weight, and nothing else."""
    hooked = has_forward_hooks(linear) or "forward" in linear.__dict__
    return type(linear) is nn.Linear and not hooked and not hasattr(linear.weight, "__tensor_flatten__")


class SeparateProjections(nn.Module):
    """One matrix each, for cross-attention whose inputs have widths of their own.

    Args:
        embed_dims: Widths of the query, key and value inputs.
        widths: Output widths W of query, key and value.
        make: ``bias``, ``device`` and ``dtype`` of the linear layers.
    """

    def __init__(self, embed_dims: tuple[int, int, int], widths: tuple[int, int, int], **make: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(e, w, **make) for e, w in zip(embed_dims, widths, strict=True))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Project (B, L, own width) inputs to (B, L, W) each."""
        return self.query(query), self.key(key), self.value(value)


def reset_projection(projection: nn.Module) -> None:
    """Xavier weights and zero biases, as in ``nn.MultiheadAttention``."""
    with torch.no_grad():
        for parameter in projection.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
