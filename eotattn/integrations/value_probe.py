"""Values of a running model: the output projection of every attention is found by what flows into it.

Legend: B batch, H query heads, Q queries, V value width, E model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eotattn.diagnostics.value_statistics import ValueStatistics
from eotattn.integrations.captured_call import CapturedCall

__all__ = ["ValueProbe"]

#: Rows of the identity that pass through a projection at once.
PROBE_ROWS = 256
#: Largest deviation of a projection from the linear map read off it, relative to its largest output; 8 bits round.
LINEAR_BOUND = 5e-2


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A call whose output no layer has read yet."""

    name: str
    call: CapturedCall
    output: Tensor
    key_mass: Tensor


class ValueProbe:
    """Collects :class:`ValueStatistics` by layer, from calls that start their sequences.

    A layer's output projection is the first module that reads exactly what its attention returned, (B, Q, H V), and is
    linear. What it computes counts, whatever it is made of: adapters, quantised weights and weights that are elsewhere
    until it runs. No names are needed, and a model whose heads pass through something else first is left out instead
    of misread.

    Args:
        key: The chosen key j*, counted from the start of each sequence.
        heads: Indices of heads to keep; ``None`` for all.
    """

    def __init__(self, key: int, heads: list[int] | None) -> None:
        self.key, self.heads = key, heads
        self.statistics: dict[str, ValueStatistics] = {}
        self._waiting: _Waiting | None = None

    def offer(self, name: str, call: CapturedCall, output: Tensor, key_mass: Tensor) -> None:
        """A call of layer ``name`` returned ``output`` (B, H, Q, V) and gave j* the weights ``key_mass`` (B, H, Q)."""
        self._waiting = _Waiting(name, call, output.detach(), key_mass)

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is about to run; it may be the projection that the last call waits for."""
        inputs = [*args, *kwargs.values()]
        if self._waiting is None or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            return
        if _is_read(self._waiting.output, inputs[0].detach()) and next(module.parameters(), None) is not None:
            weight = _linear_weight(module, inputs[0].detach())
            if weight is not None:
                self.projected(weight)

    def projected(self, weight: Tensor) -> None:
        """The last call is read by a linear layer of this weight (E, H V)."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        call = waiting.call
        real, counted = call.real_keys, call.counted
        if counted is None:
            counted = torch.ones(waiting.output.shape[0], waiting.output.shape[2], dtype=torch.bool)
        places = {"real": real, "counted": counted.to(real.device)}
        with torch.no_grad():
            found = ValueStatistics.of(call.value, waiting.output, weight, waiting.key_mass, key=self.key, **places)
        found = found if self.heads is None else found.heads(self.heads)
        old = self.statistics.get(waiting.name)
        self.statistics[waiting.name] = found if old is None else old + found

    def left(self) -> None:
        """The model has returned: nothing more will read the last call."""
        self._waiting = None


def _is_read(output: Tensor, read: Tensor) -> bool:
    """Whether ``read`` is ``output`` with its heads side by side; compared at the first and the last token."""
    batch, heads, queries, width = output.shape
    if read.shape[-1] != heads * width or read.numel() != output.numel() or read.dtype != output.dtype:
        return False
    tokens = read.reshape(batch * queries, heads * width)
    return torch.equal(tokens[0], output[0, :, 0].flatten()) and torch.equal(tokens[-1], output[-1, :, -1].flatten())


@torch.no_grad()
def _linear_weight(module: nn.Module, read: Tensor) -> Tensor | None:
    """The weight (E, H V) of the linear map that ``module`` is in evaluation; ``None`` if it is none at ``read``."""
    if type(module) is nn.Linear and "forward" not in vars(module):
        return module.weight.detach()
    width, own = read.shape[-1], next(module.parameters()).dtype
    dtype = own if own.is_floating_point and own.itemsize > 1 else read.dtype

    def output(rows: Tensor) -> Tensor:
        given = rows.to(read.device, dtype).view(*(1,) * (read.dim() - 2), -1, width)
        computed = module.forward(given)
        return computed.reshape(len(rows), -1) if isinstance(computed, Tensor) else rows[:, :0]

    with _in_evaluation(module), torch.autocast(read.device.type, enabled=False):
        tokens = read.reshape(-1, width)[[0, -1]]
        offset = output(torch.zeros(1, width))
        if offset.numel() == 0:
            return None
        rows = [output(part) - offset for part in torch.eye(width).split(PROBE_ROWS)]
        weight, expected = torch.cat(rows), output(tokens)
    error = (tokens.to(weight.dtype) @ weight + offset - expected).abs().amax()
    return weight.T if bool(error <= LINEAR_BOUND * expected.abs().amax()) else None


@contextmanager
def _in_evaluation(module: nn.Module) -> Iterator[None]:
    """No dropout, and no random numbers drawn, while the block runs."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
