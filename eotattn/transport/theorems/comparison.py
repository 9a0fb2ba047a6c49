"""The noun that every theorem returns: two sides and what lies between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["Comparison"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two sides of a statement, entry by entry.

    Args:
        statement: The statement in a line.
        left: One side.
        right: The other, broadcastable against it.
        relation: ``"<="`` for a bound, ``"=="`` for an identity.

    Example:
        >>> import torch
        >>> Comparison("one is at most two", torch.tensor(1.0), torch.tensor(2.0), "<=").slack
        tensor(1.)

    Source: original.
    """

    statement: str
    left: Tensor
    right: Tensor
    relation: Literal["<=", "=="]

    @property
    def slack(self) -> Tensor:
        """Right less left; for an identity its size. A bound holds where this is not negative."""
        difference = self.right - self.left
        return difference.abs() if self.relation == "==" else difference

    def holds(self, tolerance: float = 1e-12) -> bool:
        """Whether no entry breaks the statement by more than ``tolerance``, relative to the larger side above one.

        Args:
            tolerance: What rounding may do.

        Example:
            >>> import torch
            >>> Comparison("two is at most one", torch.tensor(2.0), torch.tensor(1.0), "<=").holds()
            False

        Source: original.
        """
        size = tolerance * self.left.abs().maximum(self.right.abs()).clamp(min=1)
        within = self.slack <= size if self.relation == "==" else self.slack >= -size
        return bool(within.all())

    def __str__(self) -> str:
        worst = self.slack.max() if self.relation == "==" else self.slack.min()
        return f"{self.statement}: slack {'at most' if self.relation == '==' else 'at least'} {float(worst):.1e}"
