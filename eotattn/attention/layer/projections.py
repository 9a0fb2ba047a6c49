"""From inputs to the flat query, key and value of all heads.

Legend: B batch, L tokens, E model width, W width of all heads together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PackedProjection", "SeparateProjections"]


class PackedProjection(nn.Linear):
    """One matrix for query, key and value: a single product in self-attention, its rows apart otherwise.

    Args:
        embed_dim: Width E of all three inputs.
        widths: Output widths of query, key and value.
        make: ``bias``, ``device`` and ``dtype`` of the linear layer.
    """

    def __init__(self, embed_dim: int, widths: tuple[int, int, int], **make: Any) -> None:
        super().__init__(embed_dim, sum(widths), **make)
        self.widths = widths

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Project (B, L, E) inputs to (B, L, W) each. Self-attention is told by identity, not by content."""
        if (key is None or key is query) and (value is None or value is query):
            return super().forward(query).split(self.widths, dim=-1)
        key = query if key is None else key
        value = key if value is None else value
        weights = self.weight.split(list(self.widths))
        biases = (None,) * 3 if self.bias is None else self.bias.split(list(self.widths))
        inputs = (query, key, value)
        return tuple(nn.functional.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))

    def reset_parameters(self) -> None:
        """Xavier weights and zero biases, as in ``nn.MultiheadAttention``."""
        _reset(self)

    def load_multihead(self, state: dict[str, Tensor]) -> None:
        """Copy the input projections out of the state dict of an ``nn.MultiheadAttention``."""
        with torch.no_grad():
            self.weight.copy_(state["in_proj_weight"])
            if self.bias is not None:
                self.bias.copy_(state["in_proj_bias"])


class SeparateProjections(nn.Module):
    """One matrix each, for cross-attention whose inputs have widths of their own.

    Args:
        embed_dims: Widths of the query, key and value inputs.
        widths: Output widths of query, key and value.
        make: ``bias``, ``device`` and ``dtype`` of the linear layers.
    """

    def __init__(self, embed_dims: tuple[int, int, int], widths: tuple[int, int, int], **make: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(e, w, **make) for e, w in zip(embed_dims, widths, strict=True))
        self.reset_parameters()

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> tuple[Tensor, ...]:
        """Project (B, L, own width) inputs to (B, L, W) each."""
        key = query if key is None else key
        value = key if value is None else value
        return self.query(query), self.key(key), self.value(value)

    def reset_parameters(self) -> None:
        """Xavier weights and zero biases."""
        for linear in (self.query, self.key, self.value):
            _reset(linear)

    def load_multihead(self, state: dict[str, Tensor]) -> None:
        """Copy the input projections out of the state dict of an ``nn.MultiheadAttention``."""
        with torch.no_grad():
            for side, (name, linear) in enumerate((("q", self.query), ("k", self.key), ("v", self.value))):
                linear.weight.copy_(state[f"{name}_proj_weight"])
                if linear.bias is not None:
                    linear.bias.copy_(state["in_proj_bias"].chunk(3)[side])


def _reset(linear: nn.Linear) -> None:
    nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
