"""The FlexAttention form of terms at given positions: features are looked up, so that no phase is rounded to float32.

Legend: B batch, H heads, Q queries, K keys, G key features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from eotattn.priors.prior_positions import table_lookup
from eotattn.priors.terms import KeyTerm, Term

__all__ = ["ScoreMod", "biased_score", "score_mod_of"]

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def score_mod_of(terms: Sequence[Term | KeyTerm], query_positions: Tensor, key_positions: Tensor) -> ScoreMod:
    """A function (score, batch, head, query_index, key_index) -> score + log_prior, at checked positions."""
    added = [_term(term, query_positions.double(), key_positions.double()) for term in terms]

    def modified(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        for add in added:
            score = add(score, batch, head, query_index, key_index)
        return score

    return modified


def _term(term: Term | KeyTerm, query_positions: Tensor, key_positions: Tensor) -> ScoreMod:
    if isinstance(term, KeyTerm):
        factor = term.features.query(query_positions)
        factor_at = table_lookup(factor.float(), has_batch=factor.dim() == 3)
        bias = term.bias(key_positions).movedim(-2, -1)
        bias_at = table_lookup(bias.float(), has_batch=bias.dim() == 3)
        return lambda score, b, h, i, j: score + factor_at(b, i, 0) * bias_at(b, j, h)
    factors, features = term.sides(query_positions, key_positions)
    query_at = table_lookup(factors.movedim(-3, -2).float(), has_batch=factors.dim() == 4)
    key_at = table_lookup(features.float(), has_batch=features.dim() == 3)

    def modified(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for g in range(features.shape[-1]):
            score = score + query_at(b, i, h, g) * key_at(b, j, g)
        return score

    return modified


def biased_score(score_mod: ScoreMod | None, of_keys: Tensor | None, of_queries: Tensor | None) -> ScoreMod | None:
    """``score_mod``, or nothing, with a bias of keys (B, 1 or H, K) and of queries (B, H, Q), nats, where given."""
    for bias, side in ((of_keys, "key"), (of_queries, "query")):
        if bias is not None:
            score_mod = _biased(score_mod, bias.float(), side)
    return score_mod


def _biased(score_mod: ScoreMod | None, table: Tensor, side: str) -> ScoreMod:
    by_head = table.shape[1] > 1

    def modified(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score if score_mod is None else score_mod(score, b, h, i, j)
        return score + table[b, h if by_head else 0, j if side == "key" else i]

    return modified
