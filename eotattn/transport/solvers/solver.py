"""The noun that turns a problem into a solution."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from eotattn.transport.problems import TransportProblem
from eotattn.transport.solution import TransportSolution

__all__ = ["Solver"]


class Solver(ABC):
    """An algorithm with its options; ``solve(problem, solver=...)`` calls it."""

    @property
    def name(self) -> str:
        """What a solution says that it was solved by."""
        return type(self).__name__

    @abstractmethod
    def run(self, problem: TransportProblem, start: Tensor | None) -> TransportSolution:
        """Solve the problem from a key potential (..., m), or from nothing."""
