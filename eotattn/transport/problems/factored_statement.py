"""From queries, keys and a prior to a factored affinity, with the checks that belong to it."""

# Legend: n queries, m keys, d content width.

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_no_nan, check_same_device, require
from eotattn.priors import LogPrior
from eotattn.priors.terms import computing_dtype
from eotattn.transport.problems.admissibility import check_broadcast
from eotattn.transport.problems.affinity import Affinity
from eotattn.transport.problems.dense import DenseAffinity
from eotattn.transport.problems.factored import FactoredAffinity, PointAffinity
from eotattn.transport.problems.prior_factors import prior_factors

__all__ = ["factored_affinity", "point_affinity"]

_OWNER = "TransportProblem"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def factored_affinity(
    query: Tensor,
    key: Tensor,
    *,
    prior: LogPrior | None,
    positions: tuple[Tensor | None, Tensor | None],
    key_padding: Tensor | None,
    is_causal: bool,
) -> FactoredAffinity:
    """Check and build the affinity ``<query_i, key_j>`` with a prior; see ``TransportProblem.from_factors``."""
    query, key = _checked_sides(query, key)
    n, m = query.shape[-2], key.shape[-2]
    rule, remedy = "have as many queries as keys under is_causal", "Leave is_causal out"
    require(not is_causal or n == m, _OWNER, "query", rule, f"{n} queries and {m} keys", remedy)
    _check_padding(key_padding, key)
    if prior is None:
        for name, value in zip(("query_positions", "key_positions"), positions, strict=True):
            require(value is None, _OWNER, name, "be left out without a prior", value, "Pass the prior too")
        return FactoredAffinity(query, key, key_padding=key_padding, direction=int(is_causal))
    rule, remedy = "be a LogPrior", "Pass a prior, e.g. RecencyPrior(num_heads)"
    require(isinstance(prior, LogPrior), _OWNER, "prior", rule, type(prior), remedy, error=TypeError)
    query_positions, key_positions = (
        torch.arange(side.shape[-2], device=side.device) if given is None else given
        for given, side in zip(positions, (query, key), strict=True)
    )
    prior.check_positions(query_positions, key_positions)
    factors = prior_factors(prior, query_positions, key_positions, dtype=query.dtype)
    rows = [part.row for part in factors if part.row is not None]
    affinity = FactoredAffinity(
        query,
        key,
        factors=tuple(replace(part, row=None) for part in factors),
        query_log_prior=sum(rows[1:], start=rows[0]) if rows else None,
        key_padding=key_padding,
        direction=int(is_causal),
    )
    _check_batch(affinity, prior)
    return affinity


def point_affinity(query: Tensor, key: Tensor, log_prior: Tensor | None) -> Affinity:
    """Check and build the affinity ``-|query_i - key_j|^2``; see ``TransportProblem.from_points``."""
    query, key = _checked_sides(query, key)
    if log_prior is None:
        return PointAffinity.between(query, key)
    dtype, n, m = computing_dtype(query.dtype), query.shape[-2], key.shape[-2]
    check_floating(_OWNER, "log_prior", log_prior)
    same = log_prior.dtype == dtype
    require(same, _OWNER, "log_prior", f"have dtype {dtype}", log_prior, "Convert it", error=TypeError)
    check_same_device(_OWNER, ("query", query), log_prior=log_prior)
    fits = log_prior.dim() >= 2 and log_prior.shape[-2] in (1, n) and log_prior.shape[-1] == m
    rule = f"have shape (..., 1, {m}) or (..., {n}, {m})"
    require(fits, _OWNER, "log_prior", rule, log_prior, "Match the points")
    check_no_nan(_OWNER, "log_prior", log_prior, allow_negative_inf=True)
    check_broadcast(_OWNER, "log_prior", log_prior, log_prior.shape[:-2], query.shape[:-2], "Match the batch of query")
    if log_prior.shape[-2] == 1:
        padding, nats = log_prior[..., 0, :] == -math.inf, log_prior[..., 0, :]
        return PointAffinity.between(
            query,
            key,
            key_log_prior=torch.where(padding, 0.0, nats),
            key_padding=padding if bool(padding.any()) else None,
        )
    empty = int((log_prior == -math.inf).all(-1).sum())
    rule = "leave every query at least one admissible key"
    require(empty == 0, _OWNER, "log_prior", rule, f"{empty} rows of -inf only", "Unmask a key in these rows")
    return DenseAffinity(PointAffinity.between(query, key).score, log_prior)


def _checked_sides(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Raise unless query and key are finite matrices that fit each other; float16 is widened."""
    for name, side in (("query", query), ("key", key)):
        check_floating(_OWNER, name, side)
        rule, remedy = "have dtype float32, float64, bfloat16 or float16", "Convert it with .float() or .double()"
        require(side.dtype in _DTYPES, _OWNER, name, rule, side, remedy, error=TypeError)
        require(side.dim() >= 2, _OWNER, name, "have shape (..., length, width)", side, "Add the missing dimension")
        require(side.numel() > 0, _OWNER, name, "hold at least one row", side, "Drop empty problems")
    rule, remedy = f"have the dtype of query ({query.dtype})", "Convert one of them"
    require(key.dtype == query.dtype, _OWNER, "key", rule, key, remedy, error=TypeError)
    check_same_device(_OWNER, ("query", query), key=key)
    check_no_nan(_OWNER, "query", query)
    check_no_nan(_OWNER, "key", key)
    rule = f"have the width of query ({query.shape[-1]})"
    require(key.shape[-1] == query.shape[-1], _OWNER, "key", rule, key, "Project both to one width")
    check_broadcast(_OWNER, "key", key, key.shape[:-2], query.shape[:-2], "Match the batch of query")
    return (query.float(), key.float()) if query.dtype == torch.float16 else (query, key)


def _check_padding(key_padding: Tensor | None, key: Tensor) -> None:
    """Raise unless the padding marks keys."""
    if key_padding is None:
        return
    is_boolean = isinstance(key_padding, Tensor) and key_padding.dtype == torch.bool
    remedy = "Pass True where a key is padding"
    require(is_boolean, _OWNER, "key_padding", "be a boolean tensor", key_padding, remedy, error=TypeError)
    check_same_device(_OWNER, ("key", key), key_padding=key_padding)
    fits = key_padding.dim() >= 1 and key_padding.shape[-1] == key.shape[-2]
    require(fits, _OWNER, "key_padding", f"have shape (..., {key.shape[-2]})", key_padding, "Match the keys")
    check_broadcast(_OWNER, "key_padding", key_padding, key_padding.shape[:-1], key.shape[:-2], "Match the keys")


def _check_batch(affinity: FactoredAffinity, prior: LogPrior) -> None:
    """Raise unless the heads and lengths of the prior fit those of query and key."""
    try:
        shape = affinity.shape
        fits = all(
            part.query.shape[-2] in (1, shape[-2]) and part.key.shape[-2] in (1, shape[-1]) for part in affinity.factors
        )
    except RuntimeError:
        fits = False
    got = f"{prior.num_heads} heads, query {tuple(affinity.query.shape)}, key {tuple(affinity.key.shape)}"
    rule, remedy = "fit query and key in heads, batch and positions", "Give query the shape (..., heads, n, d)"
    require(fits, _OWNER, "prior", rule, got, remedy)
