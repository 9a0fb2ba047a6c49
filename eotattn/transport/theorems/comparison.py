"""The noun that every theorem returns: two sides and what lies between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_no_nan, require

__all__ = ["Comparison", "check_values", "logit_size"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two sides of a statement, entry by entry.

    Args:
        statement: The statement in a line.
        left: One side.
        right: The other, broadcastable against it.
        relation: ``"<="`` for a bound, ``"=="`` for an identity.
        magnitude: Size of the numbers whose rounding reaches the sides, in their units and broadcastable to them.

    Example:
        >>> Comparison("one is at most two", torch.tensor(1.0), torch.tensor(2.0), "<=").slack
        tensor(1.)
    """

    statement: str
    left: Tensor
    right: Tensor
    relation: Literal["<=", "=="]
    magnitude: Tensor | float = field(default=1.0, kw_only=True)

    @property
    def slack(self) -> Tensor:
        """Right less left, zero where both are the same infinity; for an identity its size.

        A bound holds where this is not negative.
        """
        difference = torch.where(self.left == self.right, 0.0, self.right - self.left)
        return difference.abs() if self.relation == "==" else difference

    def holds(self, tolerance: float | None = None) -> bool:
        """Whether no entry breaks the statement by more than ``tolerance``, relative to the numbers that made it.

        Those are the sides and their ``magnitude``; below one they count as one.

        Args:
            tolerance: What rounding may do; ``None`` is 1e-12 in float64, and 64 machine epsilons below it.

        Example:
            >>> Comparison("two is at most one", torch.tensor(2.0), torch.tensor(1.0), "<=").holds()
            False
        """
        slack = self.slack
        tolerance = max(1e-12, 64 * torch.finfo(slack.dtype).eps) if tolerance is None else tolerance
        size = self.left.abs().maximum(self.right.abs()).maximum(torch.as_tensor(self.magnitude)).clamp(min=1)
        size = tolerance * torch.where(size.isfinite(), size, 1.0)
        within = slack <= size if self.relation == "==" else slack >= -size
        return bool(within.all())

    def __str__(self) -> str:
        worst = self.slack.max() if self.relation == "==" else self.slack.min()
        return f"{self.statement}: slack {'at most' if self.relation == '==' else 'at least'} {float(worst):.1e}"


def logit_size(score: Tensor, log_prior: Tensor | None, epsilon: float) -> Tensor:
    """The largest number that a row of logits is made of, nats, shape (..., n, 1)."""
    size = score.detach().abs().amax(-1, keepdim=True) / epsilon
    if log_prior is None:
        return size
    return size + torch.where(log_prior > -torch.inf, log_prior.detach().abs(), 0.0).amax(-1, keepdim=True)


def check_values(owner: str, argument: str, values: Tensor, score: Tensor, axis: int = -1) -> None:
    """Raise unless ``values`` are finite, of the dtype of the score, with one row a key."""
    check_floating(owner, argument, values)
    rule = f"have the dtype of score ({score.dtype})"
    require(values.dtype == score.dtype, owner, argument, rule, values, "Convert one of them", error=TypeError)
    fits = values.dim() >= 2 and values.shape[-2] == score.shape[axis]
    require(fits, owner, argument, f"have shape (..., {score.shape[axis]}, width)", values, "Match the score")
    check_no_nan(owner, argument, values)
