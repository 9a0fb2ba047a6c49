"""What is computed once and kept: tables of features at consecutive positions, and constants on a device.

Only values that their key determines are kept, so nothing can become stale. Nothing is kept while tensors are
transformed or captured. A compiled graph takes what its constants determine as inputs, see :class:`MadeInGraphs`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor

from eotattn.compat import constant_in_graphs, is_intercepted, lasting, map_tensors, plain_tensors, raw_stream

__all__ = ["MadeInGraphs", "constants", "is_plain", "kept", "may_remember", "name_in_graphs", "remembered"]

#: Values kept; the least recently used one goes first.
MAX_VALUES = 512

Value = TypeVar("Value")
_VALUES: OrderedDict[Hashable, object] = OrderedDict()
_LOCK = RLock()


def is_plain() -> bool:
    """Whether tensors are what they seem: nothing is compiled, transformed or dispatched to a mode."""
    return not torch.compiler.is_compiling() and not is_intercepted()


def may_remember(device: torch.device) -> bool:
    """Whether tensors made now can be kept for later calls."""
    if torch.compiler.is_compiling() or is_intercepted():
        return False
    kind = device.type
    return kind == "cpu" or (kind == "cuda" and not torch.cuda.is_current_stream_capturing())


def remembered(key: Hashable, device: torch.device, make: Callable[[], Value]) -> Value:
    """``make()``, kept for later calls with an equal ``key`` on the same device and stream.

    Args:
        key: Determines the value.
        device: Where its tensors are.
        make: Computes it; gradients are not recorded.
    """
    return kept(key, device, make) if may_remember(device) else make()


def kept(key: Hashable, device: torch.device, make: Callable[[], Value]) -> Value:
    """:func:`remembered` where it is known that tensors can be kept."""
    # what another stream computes may not be there yet
    place = (key, device, raw_stream(device) if device.type == "cuda" else 0)
    with _LOCK:
        if place in _VALUES:
            _VALUES.move_to_end(place)
            return _VALUES[place]  # type: ignore[return-value]
    with torch.inference_mode(False), torch.no_grad():
        value = make()
    with _LOCK:
        _VALUES[place] = value
        while len(_VALUES) > MAX_VALUES:
            _VALUES.popitem(last=False)
    return value


def name_in_graphs(owner: object, what: Hashable) -> str:
    """The attribute of ``owner`` that holds what graphs take from it; by equality, since -1 and -2 hash alike."""
    names: dict[Hashable, str] = vars(owner).setdefault("_in_graphs", {})
    return names.setdefault(what, f"_in_graphs_{len(names)}")


def _lasting(part: object) -> object:
    return lasting(part) if isinstance(part, Tensor) else part


class MadeInGraphs:
    """An object that computes tensors from constants once, while a graph is traced; the graph has them as inputs."""

    @constant_in_graphs
    def make_in_graph(self, method: str, *arguments: Any) -> str:
        """Call ``method`` with constants, once; returns the name of the attribute that holds what it returned."""
        name = name_in_graphs(self, (method, *arguments))
        if name not in vars(self):
            with plain_tensors():
                vars(self)[name] = map_tensors(_lasting, getattr(self, method)(*arguments))
        return name


class _Constants(MadeInGraphs):
    @staticmethod
    def _tensor(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=device)


_CONSTANTS = _Constants()


def constants(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """``numbers`` as (n,) on ``device``, put there once; not to be written to."""
    if may_remember(device):
        return kept(("constants", numbers, dtype), device, lambda: torch.tensor(numbers, dtype=dtype, device=device))
    if not numbers:
        return torch.empty(0, dtype=dtype, device=device)
    if torch.compiler.is_compiling():
        made: Tensor = getattr(_CONSTANTS, _CONSTANTS.make_in_graph("_tensor", numbers, device, dtype))
        return made
    # filled in on the device: a copy from the host would keep CUDA graphs from being captured
    return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])
