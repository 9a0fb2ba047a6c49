"""What the tensors of a transport problem must satisfy before anything is computed."""

# Legend: n queries, m keys.

from __future__ import annotations

import math

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_no_nan, check_positive, require
from eotattn.transport.problems.affinity import Affinity, DenseAffinity

__all__ = [
    "check_broadcast",
    "check_log_prior",
    "check_marginal",
    "check_reachability",
    "check_score",
    "resolved_key_penalty",
]

#: A marginal under an infinite penalty sums to one within this many machine epsilons.
_MASS_SLACK = 64


def check_score(owner: str, score: Tensor) -> None:
    """Raise unless ``score`` is a finite float32 or float64 tensor of shape (..., n, m), n and m positive.

    Args:
        owner: Who checks.
        score: The candidate.

    Raises:
        TypeError: If it is not such a tensor.
        ValueError: If its shape or an entry is out of range.

    Example:
        >>> check_score("TransportProblem", torch.zeros(2, 3))

    Source: original.
    """
    check_floating(owner, "score", score)
    fine = score.dtype in (torch.float32, torch.float64)
    remedy = "Convert it with .float() or .double()"
    require(fine, owner, "score", "have dtype float32 or float64", score, remedy, error=TypeError)
    require(score.dim() >= 2, owner, "score", "have shape (..., queries, keys)", score, "Add the missing dimension")
    filled = score.numel() > 0
    require(filled, owner, "score", "hold at least one query and one key", score, "Drop empty problems")
    check_no_nan(owner, "score", score)


def check_log_prior(owner: str, log_prior: Tensor | None, score: Tensor) -> None:
    """Raise unless ``log_prior`` fits ``score`` and leaves every query a key; ``None`` passes.

    Args:
        owner: Who checks.
        log_prior: Shape (..., n, m), nats; -inf is allowed.
        score: Shape (..., n, m), already checked.

    Raises:
        TypeError: If dtypes differ.
        ValueError: If the shape, the device or an entry is out of range.

    Example:
        >>> check_log_prior("TransportProblem", torch.zeros(2, 3), torch.zeros(4, 2, 3))

    Source: original.
    """
    if log_prior is None:
        return
    _check_fits(owner, "log_prior", log_prior, DenseAffinity(score, None), score.shape[-2:])
    check_no_nan(owner, "log_prior", log_prior, allow_negative_inf=True)
    empty = int((log_prior == -math.inf).all(-1).sum())
    rule = "leave every query at least one admissible key"
    require(empty == 0, owner, "log_prior", rule, f"{empty} rows of -inf only", "Unmask a key in these rows")


def check_marginal(
    owner: str, argument: str, value: Tensor, affinity: Affinity, size: int, *, sums_to_one: bool
) -> None:
    """Raise unless ``value`` holds non-negative masses of the right size and sum.

    Args:
        owner: Who checks.
        argument: Its name.
        value: Shape (..., size).
        affinity: Already checked.
        size: n or m.
        sums_to_one: Whether the marginal is a constraint; otherwise any positive mass passes.

    Raises:
        TypeError: If dtypes differ.
        ValueError: If the shape, the device or an entry is out of range, or the sum is wrong.

    Example:
        >>> from eotattn.transport.problems.affinity import DenseAffinity
        >>> pairs = DenseAffinity(torch.zeros(2, 3), None)
        >>> check_marginal("TransportProblem", "key_marginal", torch.ones(3), pairs, 3, sums_to_one=False)

    Source: original.
    """
    _check_fits(owner, argument, value, affinity, torch.Size((size,)))
    check_no_nan(owner, argument, value)
    negative = int((value < 0).sum())
    require(negative == 0, owner, argument, "be non-negative", f"{negative} negative entries", "Pass masses")
    mass = value.detach().sum(-1)
    positive = bool((mass > 0).all())
    require(positive, owner, argument, "have positive total mass", f"mass {float(mass.min()):g}", "Pass masses")
    if sums_to_one:
        error = float((mass - 1).abs().max())
        rule, remedy = "sum to one under an infinite penalty", "Divide it by its sum, or choose a finite penalty"
        within = error <= _MASS_SLACK * torch.finfo(value.dtype).eps
        require(within, owner, argument, rule, f"a sum {error:.1e} away from one", remedy)


def check_broadcast(owner: str, argument: str, value: Tensor, lead: torch.Size, batch: torch.Size, remedy: str) -> None:
    """Raise unless the leading dimensions of ``value`` broadcast with a batch.

    Args:
        owner: Who checks.
        argument: Its name.
        value: The tensor.
        lead: Its leading dimensions.
        batch: What they must fit.
        remedy: What to do otherwise.

    Raises:
        ValueError: If they do not.

    Example:
        >>> value = torch.zeros(2, 1, 3)
        >>> check_broadcast("TransportProblem", "score", value, value.shape[:-1], torch.Size((5,)), "Match it")

    Source: original.
    """
    try:
        torch.broadcast_shapes(lead, batch)
    except RuntimeError:
        rule = f"have leading dimensions that broadcast with {tuple(batch)}"
        require(False, owner, argument, rule, value, remedy)


def check_reachability(
    owner: str,
    batch_shape: torch.Size,
    affinity: Affinity,
    query_marginal: Tensor,
    key_marginal: Tensor | None,
    key_penalty: float,
) -> None:
    """Raise unless the masks leave every query a key with mass, and every hard key mass a query with mass.

    These are necessary conditions; whether a mask admits two hard marginals at all is a flow problem, and a solver
    answers it by not converging.

    Args:
        owner: Who checks.
        batch_shape: Broadcast leading dimensions.
        affinity: Which says what is admissible.
        query_marginal: Shape (..., n).
        key_marginal: Shape (..., m), or ``None`` for free keys.
        key_penalty: Cost units.

    Raises:
        ValueError: If a query or a key is stranded.

    Example:
        >>> from eotattn.transport.problems.affinity import DenseAffinity
        >>> pairs = DenseAffinity(torch.zeros(2, 3), None)
        >>> check_reachability("TransportProblem", torch.Size(), pairs, torch.ones(2) / 2, None, 0.0)

    Source: original.
    """
    *_, n, m = affinity.shape
    if key_marginal is None:
        has_mass = torch.ones(*batch_shape, m, dtype=torch.bool, device=affinity.device)
        argument, rule = "key_padding", "leave every query at least one admissible key"
    else:
        has_mass = (key_marginal > 0).expand(*batch_shape, m)
        argument, rule = "key_marginal", "give mass to an admissible key of every query"
    stranded = int((~affinity.transposed.reachable(has_mass).expand(*batch_shape, n)).sum())
    require(stranded == 0, owner, argument, rule, f"{stranded} queries without one", "Unmask or add mass")
    if key_marginal is not None and math.isinf(key_penalty):
        unreached = int((has_mass & ~affinity.reachable(query_marginal > 0)).sum())
        rule = "be zero on keys that no query with mass may use, under an infinite penalty"
        remedy = "Unmask them, set their mass to zero, or choose a finite key_penalty"
        require(unreached == 0, owner, "key_marginal", rule, f"{unreached} such keys with mass", remedy)


def resolved_key_penalty(owner: str, key_penalty: float | None, key_marginal: Tensor | None) -> float:
    """Return the key penalty: no key marginal means zero, a key marginal means infinite unless stated.

    Args:
        owner: Who checks.
        key_penalty: Cost units, or ``None``.
        key_marginal: Shape (..., m), or ``None`` for free keys.

    Raises:
        TypeError: If the penalty is not a number.
        ValueError: If it is out of range, or does not go with the marginal.

    Example:
        >>> resolved_key_penalty("TransportProblem", None, None)
        0.0

    Source: original.
    """
    if key_penalty is None:
        return 0.0 if key_marginal is None else math.inf
    value = check_positive(owner, "key_penalty", key_penalty, allow_zero=True, allow_inf=True)
    if key_marginal is None:
        remedy = "Pass a key_marginal, or leave key_penalty out"
        require(value == 0, owner, "key_penalty", "be left out where there is no key_marginal", key_penalty, remedy)
    else:
        remedy = "Leave key_marginal out for free keys, or choose a penalty above zero"
        require(value > 0, owner, "key_penalty", "be positive where there is a key_marginal", key_penalty, remedy)
    return value


def _check_fits(owner: str, argument: str, value: Tensor, affinity: Affinity, trailing: torch.Size) -> None:
    """Raise unless ``value`` shares dtype and device with the score and ends in ``trailing``, batch broadcastable."""
    check_floating(owner, argument, value)
    rule = f"have the dtype of score ({affinity.dtype})"
    remedy = "Convert it with .to(score.dtype)"
    require(value.dtype == affinity.dtype, owner, argument, rule, value, remedy, error=TypeError)
    rule, remedy = f"be on the device of score ({affinity.device})", "Move it with .to(score.device)"
    require(value.device == affinity.device, owner, argument, rule, value, remedy)
    fits = value.dim() >= len(trailing) and value.shape[value.dim() - len(trailing) :] == trailing
    wanted = "(..., " + ", ".join(str(size) for size in trailing) + ")"
    require(fits, owner, argument, f"have shape {wanted}", value, "Match the queries and keys of score")
    lead = value.shape[: value.dim() - len(trailing)]
    check_broadcast(owner, argument, value, lead, affinity.shape[:-2], "Match the batch of score")
