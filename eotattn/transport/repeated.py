"""The balance of the keys, drawn again and again: on a GPU its many small operations become one graph."""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.transport.keys import KeyBalance, balance
from eotattn.transport.problem import TransportProblem

__all__ = ["RepeatedBalance"]

#: Calls before a graph pays; they also load and tune the kernels that it records.
_EAGER_CALLS = 3


class RepeatedBalance:
    """``balance`` at one temperature; what it returns may be overwritten by the next call.

    Args:
        problem: The problem, with a key marginal and without gradients.
        epsilon: Temperature, cost units.

    Example:
        >>> problem = TransportProblem(torch.zeros(1, 2), key_marginal=torch.tensor([0.25, 0.75]))
        >>> float(RepeatedBalance(problem, 1.0)(torch.zeros(2)).error)
        0.5

    Source: original.
    """

    def __init__(self, problem: TransportProblem, epsilon: float) -> None:
        self._problem, self._epsilon = problem, epsilon
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, key_potential: Tensor) -> KeyBalance:
        """Return the balance at a key potential of shape (..., m)."""
        self._calls += 1
        if key_potential.device.type != "cuda" or self._calls <= _EAGER_CALLS:
            return balance(self._problem, key_potential, epsilon=self._epsilon)
        if self._graph is None:
            self._record(key_potential)
        self._input.copy_(key_potential)
        assert self._graph is not None
        self._graph.replay()
        return self._state

    def _record(self, key_potential: Tensor) -> None:
        self._input = key_potential.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._state = balance(self._problem, self._input, epsilon=self._epsilon)
