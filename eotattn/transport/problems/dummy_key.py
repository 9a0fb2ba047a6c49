"""Transport that may leave mass where it is: one more key, which costs a price and no score."""

# Legend: n queries, m keys; the leading dimensions (...) are a batch.

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_no_nan, require
from eotattn.transport.problems.admissibility import check_log_prior, check_score
from eotattn.transport.problems.problem import TransportProblem

__all__ = ["with_dummy_key"]

_OWNER = "with_dummy_key"
#: How far the masses may be from one before it is the caller's arithmetic; TransportProblem looks closer.
_COARSE = 1e-3


def with_dummy_key(
    score: Tensor,
    logit: Tensor | float,
    *,
    log_prior: Tensor | None = None,
    key_marginal: Tensor | None = None,
    untransported: float | None = None,
    **options: Any,
) -> TransportProblem:
    """State transport in which a query may keep part of its mass: what attention with a sink solves.

    Query i keeps u_i >= 0 and sends P_ij. With epsilon, log-prior and query marginal a as in :class:`TransportProblem`
    and reference ``r_i = a_i exp(logit_i)`` of what is kept, the problem is

    ``min  <P, -score> + epsilon KL(P || R) + epsilon KL(u || r)   subject to   P 1 + u = a``

    that is, a dummy key of score zero and log-prior ``logit``. With free keys its solution is attention with a sink:
    ``P_ij / a_i`` are the weights and ``u_i / a_i`` is the sink's mass. With ``key_marginal`` and ``untransported``
    the dummy key has a marginal of its own, and it is partial transport: the keys receive their masses, and the
    queries keep ``untransported`` in all, which is left where it is cheapest.

    Args:
        score: Affinities, cost units, shape (..., n, m).
        logit: Nats: a number, (..., n), or (..., 1) for all queries; what :class:`~eotattn.attention.AttentionSinks`
            gives a query.
        log_prior: Nats, shape (..., n, m) up to broadcasting of leading dimensions; does not reach the dummy key.
        key_marginal: Masses of the keys, shape (..., m), summing to ``1 - untransported``.
        untransported: Mass that stays, in (0, 1); with ``key_marginal``, and only then.
        options: Everything else that :class:`TransportProblem` takes.

    Returns:
        The problem with m + 1 keys, the dummy key last.

    Raises:
        ValueError: If a shape or number does not fit.
        TypeError: For dtypes that do not fit.

    Example:
        >>> from eotattn.transport import solve
        >>> solve(with_dummy_key(torch.zeros(1, 2), 0.0)).attention_weights
        tensor([[0.3333, 0.3333, 0.3333]])

    Source: dummy points of partial transport, Caffarelli and McCann 2010; Chapel et al. 2020 (arXiv 2002.08276).
    """
    check_score(_OWNER, score)
    check_log_prior(_OWNER, log_prior, score)
    is_number = isinstance(logit, (int, float, Tensor)) and not isinstance(logit, bool)
    require(is_number, _OWNER, "logit", "be a number or a tensor", logit, "Pass nats", error=TypeError)
    kept = torch.as_tensor(logit, dtype=score.dtype, device=score.device)
    check_no_nan(_OWNER, "logit", kept)
    queries, keys = score.shape[-2:]
    fits = kept.dim() == 0 or kept.shape[-1] in (1, queries)
    require(fits, _OWNER, "logit", f"be a number, or end in 1 or {queries} numbers", kept, "Pass one a query")
    both = (key_marginal is None) == (untransported is None)
    rule = "be given with key_marginal, and only with it"
    require(both, _OWNER, "untransported", rule, untransported, "Pass both for partial transport, or neither")
    prior = torch.zeros_like(score) if log_prior is None else log_prior
    kept = kept[..., None] if kept.dim() else kept.expand(1, 1)
    lead = torch.broadcast_shapes(prior.shape[:-2], kept.shape[:-2])
    columns = [prior.expand(*lead, queries, keys), kept.expand(*lead, queries, 1)]
    if key_marginal is not None:
        assert untransported is not None
        inside = isinstance(untransported, float) and 0 < untransported < 1
        require(inside, _OWNER, "untransported", "lie in (0, 1)", untransported, "Pass the part of the mass that stays")
        check_floating(_OWNER, "key_marginal", key_marginal)
        penalty = options.get("key_penalty")
        is_soft = penalty is not None and (isinstance(penalty, Tensor) or penalty != math.inf)
        sums = key_marginal.detach().double().sum(-1)
        fits = is_soft or bool(((sums + untransported - 1).abs() < _COARSE).all())
        rule = f"sum to 1 - untransported, {1 - untransported:g}"
        require(fits, _OWNER, "key_marginal", rule, sums.tolist(), "Multiply it by that over its sum")
        own = key_marginal.new_full((*key_marginal.shape[:-1], 1), untransported)
        key_marginal = torch.cat([key_marginal, own], dim=-1)
    padded = torch.cat([score, score.new_zeros(*score.shape[:-1], 1)], dim=-1)
    return TransportProblem(padded, log_prior=torch.cat(columns, dim=-1), key_marginal=key_marginal, **options)
