"""OutputGate: each query scales what its heads have gathered.

Legend: B batch, E model width, H heads, Q queries, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eotattn.attention.layer.projections import reset_projection
from eotattn.checks import check_choice

__all__ = ["OutputGate"]

KINDS = ("elementwise", "head")


class OutputGate(nn.Module):
    """Gated attention: the output of every head times sigmoid(x W), x being the input of its query.

    A head that has nothing to say closes its gate instead of attending to a sink.

    Args:
        embed_dim: Model width E.
        num_heads: Heads H.
        head_dim: Width V of a head's output.
        kind: ``"elementwise"`` for a gate a column of every head, ``"head"`` for one a head.
        bias: Whether the gate has a bias.
        make: ``device`` and ``dtype``.

    Source: Qiu et al. 2025 (arXiv 2505.06708), gate after the attention output.

    Example:
        >>> OutputGate(8, 2, 4, kind="head")(torch.ones(1, 2, 3, 4), torch.zeros(1, 3, 8))[0, 0, 0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        kind: str = "elementwise",
        bias: bool = True,
        **make: Any,
    ) -> None:
        super().__init__()
        self.kind, self.num_heads = check_choice("OutputGate", "output_gate", kind, KINDS), num_heads
        width = num_heads * (head_dim if kind == "elementwise" else 1)
        self.projection = nn.Linear(embed_dim, width, bias=bias, **make)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier weights and zero biases, like the other projections of a layer."""
        reset_projection(self.projection)

    def forward(self, heads: Tensor, query: Tensor) -> Tensor:
        """Gate (B, H, Q, V) by the inputs (B, Q, E) of its queries."""
        gates = self.projection(query).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads * torch.sigmoid(gates).to(heads.dtype)

    def extra_repr(self) -> str:
        """Which gate it is."""
        return f"kind={self.kind!r}"
