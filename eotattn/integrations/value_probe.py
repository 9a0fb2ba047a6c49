"""Values of a running model: the output projection of every attention is found by what flows into it.

Legend: B batch, H query heads, Q queries, V value width, E model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eotattn.diagnostics.value_statistics import ValueStatistics
from eotattn.integrations.captured_call import CapturedCall

__all__ = ["ValueProbe"]


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A call whose output no layer has read yet."""

    name: str
    call: CapturedCall
    output: Tensor
    key_mass: Tensor


class ValueProbe:
    """Collects :class:`ValueStatistics` by layer, from calls that start their sequences.

    A layer's output projection is the first linear layer that reads exactly what its attention returned, (B, Q, H V).
    No names are needed, and a model whose heads pass through something else first is left out instead of misread.

    Args:
        key: The chosen key j*, counted from the start of each sequence.
        heads: Indices of heads to keep; ``None`` for all.
    """

    def __init__(self, key: int, heads: list[int] | None) -> None:
        self.key, self.heads = key, heads
        self.statistics: dict[str, ValueStatistics] = {}
        self._weights: dict[str, Callable[[], Tensor]] = {}
        self._waiting: _Waiting | None = None

    def offer(self, name: str, call: CapturedCall, output: Tensor, key_mass: Tensor) -> None:
        """A call of layer ``name`` returned ``output`` (B, H, Q, V) and gave j* the weights ``key_mass`` (B, H, Q)."""
        self._waiting = _Waiting(name, call, output.detach(), key_mass)
        if name in self._weights:
            self.projected(self._weights[name])

    def entered(self, module: nn.Module, inputs: Any) -> None:
        """A module is about to run; it may be the projection that the last call waits for."""
        if self._waiting is None or not inputs or not isinstance(inputs[0], Tensor):
            return
        weight = _linear_weight(module)
        if weight is not None and _is_read(self._waiting.output, inputs[0].detach()):
            self.projected(weight)

    def projected(self, weight: Callable[[], Tensor]) -> None:
        """The last call is read by a linear layer of this weight (E, H V)."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        self._weights[waiting.name] = weight
        call = waiting.call
        real, counted = call.real_keys, call.counted
        if counted is None:
            counted = torch.ones(waiting.output.shape[0], waiting.output.shape[2], dtype=torch.bool)
        places = {"real": real, "counted": counted.to(real.device)}
        with torch.no_grad():
            found = ValueStatistics.of(
                call.value, waiting.output, weight().detach(), waiting.key_mass, key=self.key, **places
            )
        found = found if self.heads is None else found.heads(self.heads)
        old = self.statistics.get(waiting.name)
        self.statistics[waiting.name] = found if old is None else old + found


def _linear_weight(module: nn.Module) -> Callable[[], Tensor] | None:
    """The weight (E, H V) of a linear layer; GPT-2's Conv1D stores its transpose."""
    if isinstance(module, nn.Linear):
        return lambda: module.weight
    if type(module).__name__ == "Conv1D":
        return lambda: module.weight.T  # type: ignore[return-value]
    return None


def _is_read(output: Tensor, read: Tensor) -> bool:
    """Whether ``read`` is ``output`` with its heads side by side; compared at the first and the last token."""
    batch, heads, queries, width = output.shape
    if read.shape[-1] != heads * width or read.numel() != output.numel() or read.dtype != output.dtype:
        return False
    tokens = read.reshape(batch * queries, heads * width)
    return torch.equal(tokens[0], output[0, :, 0].flatten()) and torch.equal(tokens[-1], output[-1, :, -1].flatten())
