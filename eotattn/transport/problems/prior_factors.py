"""A log-prior as products of factors, for problems that never see all pairs.

Legend: (...) batch, H heads, Q queries, K keys, F factors, P lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eotattn.priors import KeyTerm, LogPrior
from eotattn.priors.probing import constant_key_features
from eotattn.priors.splitting import split_numbers
from eotattn.priors.terms import computing_dtype

__all__ = ["PriorFactors", "prior_factors"]


@dataclass(frozen=True)
class PriorFactors:
    """Part of a log-prior in factored form: log_prior_ij = <query_i, key_j> + row_i."""

    query: Tensor  # (..., 1 or H, Q, F), nats or dimensionless
    key: Tensor  # (..., 1 or H, K, F)
    row: Tensor | None = None  # (..., H, Q), nats: what attention does not see, and two-sided transport does
    exact: Literal["query", "key"] | None = None  # the side whose entries are zeros and ones

    def split(self, dtype: torch.dtype, *, query_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Both sides as lanes of ``dtype``, (..., 1 or H, L, P): each factor in three numbers where it has 16 bits.

        ``query_scale`` multiplies the query side before rounding, or the key side where the query is exact.
        """
        count = 1 if dtype == computing_dtype(dtype) else 3
        on_key = self.exact == "query"
        query, key = (self.query, self.key * query_scale) if on_key else (self.query * query_scale, self.key)
        query_pieces = split_numbers(query, dtype, 1 if self.exact == "query" else count)
        key_pieces = split_numbers(key, dtype, 1 if self.exact == "key" else count)
        kept = [(a, b) for a in range(len(query_pieces)) for b in range(len(key_pieces)) if a + b < count]
        return torch.cat([query_pieces[a] for a, _ in kept], dim=-1), torch.cat(
            [key_pieces[b] for _, b in kept], dim=-1
        )


def prior_factors(
    prior: LogPrior, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype
) -> tuple[PriorFactors, ...]:
    """The terms of a prior multiplied out at checked positions, in float64 for float64 and else in float32.

    Raises:
        NotImplementedError: If the prior has no lanes.
    """
    query_at, key_at, computing = query_positions.double(), key_positions.double(), computing_dtype(dtype)
    made = []
    for term in prior.terms():
        query = term.features.query(query_at).double().unsqueeze(-3)
        if isinstance(term, KeyTerm):
            key = term.bias(key_at).unsqueeze(-1).to(computing)
            made.append(PriorFactors(query.to(computing), key, exact="query"))
            continue
        key, weights = term.features.key(key_at).double().unsqueeze(-3), term.weights.double()
        if weights.shape[-2] < weights.shape[-1]:
            made.append(PriorFactors(query.to(computing), (key @ weights.mT).to(computing)))
            continue
        is_constant = constant_key_features(term.features.name, prior.num_coordinates)
        factors, row = (query @ weights).to(computing), None
        for g, constant in enumerate(is_constant):
            if constant:
                row = factors[..., g] if row is None else row + factors[..., g]
        kept = [g for g, constant in enumerate(is_constant) if not constant]
        made.append(PriorFactors(factors[..., kept], key[..., kept].to(computing), row=row))
    return tuple(made)
