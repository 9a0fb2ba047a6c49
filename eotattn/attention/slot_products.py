"""Lanes of the queries of a recorded step: a few products a lane, of a coefficient and of a number of the slot.

Legend: H heads, S slots, n slots of a step, C columns of a table, N coefficients, P lanes, K products a lane.

A table times the matrix of coefficients is the general way; almost all of that matrix is zero. For one token, sums of
the few products that are not are pointwise, so that a compiler computes them where it writes the query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eotattn.priors.lane_sides import SidePlan
from eotattn.priors.splitting import write_pieces

__all__ = ["SlotProducts"]

#: Products a lane at most; more are left to the general way.
MOST_PRODUCTS = 4


class SlotProducts(NamedTuple):
    """What lanes of queries are sums of.

    Args:
        factors: (S, K, P) or (B, S, K, P), in the dtype of the table: what coefficients are multiplied with.
        fixed: (S, P) or (B, S, P): what is in a lane besides.
        chosen: (K, P) int64, the coefficient of each product.
        piece: (P,) int8: which piece of the sum a lane is.
    """

    factors: Tensor
    fixed: Tensor
    chosen: Tensor
    piece: Tensor

    @classmethod
    def of(cls, plan: SidePlan, table: Tensor) -> SlotProducts | None:
        """The products at the positions of a table (S, C) or (B, S, C); ``None`` where these are many."""
        if plan.selection is None or plan.constant is not None or plan.fixed.shape[0] > 1:
            return None
        columns, lanes = plan.fixed.shape[1:]
        weights = plan.selection.view(-1, columns, lanes).permute(2, 0, 1).flatten(1).to(table.device)
        count = int((weights != 0).sum(1).max())
        if count > MOST_PRODUCTS:
            return None
        where = (weights != 0).int().argsort(dim=1, descending=True)[:, :count]  # the rest of a row is zero
        values = weights.gather(1, where).T.to(table.dtype)
        factors = table[..., (where % columns).T] * values
        fixed = table @ plan.fixed[0].to(table)
        return cls(factors, fixed, (where // columns).T.contiguous(), plan.piece.to(table.device))

    def lanes(self, coefficients: Tensor, at: Tensor, depth: int, dtype: torch.dtype) -> Tensor:
        """(H, n, P) or (B, H, n, P) in ``dtype``: the lanes in slots ``at`` from coefficients (H, N) float64.

        Args:
            coefficients: Of the terms, as they are now.
            at: (n,) slots.
            depth: Pieces of a sum at most.
            dtype: Of the kernel.
        """
        factors, total = self.factors.index_select(-3, at), self.fixed.index_select(-2, at).unsqueeze(-3)
        for k, chosen in enumerate(self.chosen):
            total = total + coefficients[:, chosen].unsqueeze(-2) * factors[..., k, :].unsqueeze(-3)
        return write_pieces(total.to(self.fixed.dtype), self.piece, depth, dtype)
