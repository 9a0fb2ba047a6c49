"""What the tensors of a transport problem must satisfy before anything is computed."""

# Legend: n queries, m keys.

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_no_nan, check_positive, require
from eotattn.transport.problems.affinity import Affinity, Number, is_absent, is_constraint
from eotattn.transport.problems.dense import DenseAffinity

__all__ = [
    "check_broadcast",
    "check_log_prior",
    "check_number",
    "check_reachability",
    "check_score",
    "checked_marginal",
    "resolved_key_penalty",
]

#: A marginal under an infinite penalty sums to one within this many machine epsilons.
_MASS_SLACK = 64


def check_score(owner: str, score: Tensor) -> None:
    """Raise unless ``score`` is a finite float32 or float64 tensor of shape (..., n, m), n and m positive."""
    check_floating(owner, "score", score)
    fine = score.dtype in (torch.float32, torch.float64)
    remedy = "Convert it with .float() or .double()"
    require(fine, owner, "score", "have dtype float32 or float64", score, remedy, error=TypeError)
    require(score.dim() >= 2, owner, "score", "have shape (..., queries, keys)", score, "Add the missing dimension")
    filled = score.numel() > 0
    require(filled, owner, "score", "hold at least one query and one key", score, "Drop empty problems")
    check_no_nan(owner, "score", score)


def check_log_prior(owner: str, log_prior: Tensor | None, score: Tensor) -> None:
    """Raise unless ``log_prior`` fits ``score`` and leaves every query a key; ``None`` passes."""
    if log_prior is None:
        return
    _check_fits(owner, "log_prior", log_prior, DenseAffinity(score, None), score.shape[-2:])
    check_no_nan(owner, "log_prior", log_prior, allow_negative_inf=True)
    empty = int((log_prior == -math.inf).all(-1).sum())
    rule = "leave every query at least one admissible key"
    require(empty == 0, owner, "log_prior", rule, f"{empty} rows of -inf only", "Unmask a key in these rows")


def checked_marginal(
    owner: str, argument: str, value: Tensor, affinity: Affinity, size: int, *, sums_to_one: bool
) -> Tensor:
    """Return ``value``, or raise unless it holds non-negative masses (..., size) of the right sum.

    A constraint sums to one within the rounding of its dtype, or, with a warning, within that of float32: then it is
    divided by its sum.
    """
    _check_fits(owner, argument, value, affinity, torch.Size((size,)))
    check_no_nan(owner, argument, value)
    negative = int((value < 0).sum())
    require(negative == 0, owner, argument, "be non-negative", f"{negative} negative entries", "Pass masses")
    mass = value.detach().sum(-1)
    positive = bool((mass > 0).all())
    require(positive, owner, argument, "have positive total mass", f"mass {float(mass.min()):g}", "Pass masses")
    error = float((mass - 1).abs().max())
    if not sums_to_one or error <= _MASS_SLACK * torch.finfo(value.dtype).eps:
        return value
    rule, remedy = "sum to one under an infinite penalty", "Divide it by its sum, or choose a finite penalty"
    within = error <= _MASS_SLACK * torch.finfo(torch.float32).eps
    require(within, owner, argument, rule, f"a sum {error:.1e} away from one", remedy)
    message = (
        f"{owner}: {argument} sums to one within the rounding of float32 only ({error:.1e} away), so it is divided"
    )
    warnings.warn(f"{message} by its sum.", stacklevel=4)
    return value / value.sum(-1, keepdim=True)


def check_number(
    owner: str,
    argument: str,
    value: Number,
    affinity: Affinity,
    *,
    allow_zero: bool = False,
    allow_inf: bool = False,
) -> Number:
    """Return a number, or one number a problem as a tensor of shape (..., 1), which must be positive and finite."""
    if not isinstance(value, Tensor):
        return check_positive(owner, argument, value, allow_zero=allow_zero, allow_inf=allow_inf)
    _check_fits(owner, argument, value, affinity, torch.Size((1,)))
    fine = bool(((value > 0) & value.isfinite()).all())
    remedy = "Pass a Python float for zero or infinity, which all problems of a batch share"
    require(fine, owner, argument, "be positive and finite in every entry", value, remedy)
    kernel = affinity.resolution <= torch.finfo(affinity.dtype).eps or argument != "epsilon"
    rule, remedy = "be a Python float where the kernel has 16 bits", "Pass float32 factors"
    require(kernel, owner, argument, rule, value, remedy)
    return value


def check_broadcast(owner: str, argument: str, value: Tensor, lead: torch.Size, batch: torch.Size, remedy: str) -> None:
    """Raise unless the leading dimensions of ``value`` broadcast with a batch."""
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
    key_penalty: Number,
) -> None:
    """Raise unless the masks leave every query a key with mass, and every hard key mass a query with mass.

    These are necessary conditions; whether a mask admits two hard marginals at all is a flow problem, and a solver
    names it where it meets it.
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
    if key_marginal is not None and is_constraint(key_penalty):
        unreached = int((has_mass & ~affinity.reachable(query_marginal > 0)).sum())
        rule = "be zero on keys that no query with mass may use, under an infinite penalty"
        remedy = "Unmask them, set their mass to zero, or choose a finite key_penalty"
        require(unreached == 0, owner, "key_marginal", rule, f"{unreached} such keys with mass", remedy)


def resolved_key_penalty(
    owner: str, key_penalty: Number | None, key_marginal: Tensor | None, affinity: Affinity
) -> Number:
    """Return the key penalty: no key marginal means zero, a key marginal means infinite unless stated."""
    if key_penalty is None:
        return 0.0 if key_marginal is None else math.inf
    value = check_number(owner, "key_penalty", key_penalty, affinity, allow_zero=True, allow_inf=True)
    if key_marginal is None:
        remedy = "Pass a key_marginal, or leave key_penalty out"
        rule = "be left out where there is no key_marginal"
        require(is_absent(value), owner, "key_penalty", rule, key_penalty, remedy)
    else:
        remedy = "Leave key_marginal out for free keys, or choose a penalty above zero"
        rule = "be positive where there is a key_marginal"
        require(not is_absent(value), owner, "key_penalty", rule, key_penalty, remedy)
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
