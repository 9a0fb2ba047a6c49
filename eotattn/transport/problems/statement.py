"""From queries, keys and a prior to a factored affinity, with the checks that belong to it."""

# Legend: n queries, m keys, d content width.

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_no_nan, check_same_device, require
from eotattn.priors import LogPrior
from eotattn.priors.base import computing_dtype
from eotattn.transport.problems.admissibility import check_broadcast
from eotattn.transport.problems.factored import FactoredAffinity
from eotattn.transport.problems.prior_factors import prior_factors

__all__ = ["factored_affinity", "point_affinity"]

_OWNER = "TransportProblem"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def factored_affinity(
    query: Tensor,
    key: Tensor,
    *,
    prior: LogPrior | None,
    positions: tuple[Tensor | None, Tensor | None],
    key_padding: Tensor | None,
    is_causal: bool,
) -> FactoredAffinity:
    """Check and build the affinity ``<query_i, key_j>`` with a prior.

    Args:
        query: Shape (..., n, d).
        key: Shape (..., m, d).
        prior: A log-prior with lanes, or ``None``.
        positions: Of queries and keys, tokens; ``None`` counts from zero.
        key_padding: Booleans, shape (..., m), or ``None``.
        is_causal: Whether query i may use keys 0 to i only.

    Returns:
        The affinity.

    Raises:
        TypeError: If a tensor has the wrong dtype.
        ValueError: If a shape or value is out of range, or an argument would have no effect.
        NotImplementedError: If the prior has no lanes.

    Example:
        >>> options = {"prior": None, "positions": (None, None), "key_padding": None, "is_causal": False}
        >>> factored_affinity(torch.zeros(2, 4), torch.zeros(3, 4), **options).shape
        torch.Size([2, 3])

    Source: original.
    """
    _check_sides(query, key)
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
    affinity = FactoredAffinity(query, key, factors=factors, key_padding=key_padding, direction=int(is_causal))
    _check_batch(affinity, prior)
    return affinity


def point_affinity(query: Tensor, key: Tensor) -> FactoredAffinity:
    """Check and build the affinity ``-|query_i - key_j|^2``: an inner product and a bias on each side.

    Distances do not see a common shift, but their expansion does: far from the origin it is a difference of large
    numbers. So the points are centred first, all problems of a batch alike; bfloat16 points, which that would round,
    are taken as they are.

    Args:
        query: Shape (..., n, d).
        key: Shape (..., m, d).

    Returns:
        The affinity.

    Raises:
        TypeError: If a tensor has the wrong dtype.
        ValueError: If a shape or value is out of range.

    Example:
        >>> point_affinity(torch.zeros(1, 2), torch.ones(1, 2)).score
        tensor([[-2.]])

    Source: original.
    """
    _check_sides(query, key)
    dtype = computing_dtype(query.dtype)
    if query.dtype == dtype:
        centre = sum(side.detach().flatten(0, -2).mean(0) for side in (query, key)) / 2
        query, key = query - centre, key - centre
    query_bias, key_bias = (-side.to(dtype).square().sum(-1) for side in (query, key))
    return FactoredAffinity(2 * query, key, query_bias, key_bias)


def _check_sides(query: Tensor, key: Tensor) -> None:
    """Raise unless query and key are finite matrices that fit each other."""
    for name, side in (("query", query), ("key", key)):
        check_floating(_OWNER, name, side)
        rule, remedy = "have dtype float32, float64 or bfloat16", "Convert it with .float() or .double()"
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
