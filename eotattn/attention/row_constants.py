"""What lanes leave out of a log-prior: a number a row, which softmax does not see and a log-sum-exp does.

Legend: B batch, H query heads, Q queries, F query features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eotattn.attention.call import AttentionCall
from eotattn.attention.operands import call_terms, plan_of
from eotattn.priors.lane_plan import LanePlan
from eotattn.priors.terms import KeyTerm, Term

__all__ = ["row_constants"]


def row_constants(call: AttentionCall) -> Tensor | None:
    """(H, Q) or (B, H, Q) float64, nats: log-prior less what the lanes of the call carry; ``None`` for zero.

    Without gradient: the lanes that leave these numbers out carry their gradient all the same.
    """
    terms, bias = call_terms(call), None if call.query_bias is None else call.query_bias.detach().double()
    if not terms:
        return bias
    stored = None if call.cache is None else call.cache.stored_plan(call)
    plan, origin = plan_of(call, terms) if stored is None else stored
    total = _left_out(plan, terms, call.query_positions.tensor.double(), origin, call.query_gains)
    return bias if total is None else total if bias is None else total + bias


@torch.no_grad()
def _left_out(
    plan: LanePlan,
    terms: Sequence[Term | KeyTerm],
    positions: Tensor,
    origin: Tensor | float,
    gains: Sequence[Tensor | None],
) -> Tensor | None:
    total = None
    for number, key_feature in plan.left_out:
        term = terms[number]
        assert isinstance(term, Term)
        features = term.features
        rows = features.query(positions - origin if features.is_relative else positions).double()  # (..., Q, F)
        for coefficient, feature, of_key, sign in features.entries:
            if of_key == key_feature:
                part = term.coefficients[:, coefficient].double() * (sign * rows[..., None, :, feature])
                gain = gains[number] if gains else None
                part = part if gain is None else gain.double() * part
                total = part if total is None else total + part
    return total
