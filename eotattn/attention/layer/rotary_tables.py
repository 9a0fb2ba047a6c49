"""Cosines and sines of rotary embeddings: computed once in float64, remembered, and never inside a compiled rotation.

Legend: B batch, L tokens, R pairs of features that turn together.

Consecutive positions are a slice of one table, which a compiled graph takes as an input. Other positions have a table
of their own, remembered with them; in a compiled graph an operator that the compiler does not look into makes it, since
a compiler that does repeats every phase for each batch element and head.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eotattn.compat import in_export, tensor_version
from eotattn.priors.memory import may_remember

__all__ = ["FIRST_LENGTH", "Frequencies", "positions_table", "run_table"]

#: Positions 0, 1, 2, ... in the first table of consecutive ones; longer inputs double it.
FIRST_LENGTH = 8192
#: Tables remembered for positions that are not consecutive.
MAX_GIVEN = 16


class Frequencies(NamedTuple):
    """What determines the phases: position / interpolation * base^(-r / num_pairs) radians, r = 0, ..., R - 1."""

    base: float
    interpolation: float
    num_pairs: int


def compute(positions: Tensor, frequencies: Frequencies, dtype: torch.dtype) -> Tensor:
    """Cosines and sines (2, ..., L, R) of (..., L) positions, from phases in float64."""
    base, interpolation, num_pairs = frequencies
    steps = torch.arange(num_pairs, dtype=torch.float64, device=positions.device) / num_pairs
    phase = (positions.double() / interpolation).unsqueeze(-1) * base**-steps
    return torch.stack([phase.cos(), phase.sin()]).to(dtype)


@functools.lru_cache(maxsize=64)
def run_table(frequencies: Frequencies, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The table (2, length, R) of positions 0, 1, 2, ..., one for all layers alike; for :func:`may_remember`.

    It is computed on the CPU, so that any stream may read it once it is on the device.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        return compute(torch.arange(length), frequencies, dtype).to(device)


def positions_table(
    positions: Tensor, given: Tensor | range | None, frequencies: Frequencies, dtype: torch.dtype
) -> Tensor:
    """The table (2, ..., L, R) of (..., L) positions that are no slice of a run, remembered with what was ``given``."""
    if torch.compiler.is_compiling() and not in_export():
        return _opaque(positions, *frequencies, dtype)
    if not isinstance(given, Tensor) or not may_remember(given.device) or given.requires_grad or given.is_inference():
        return compute(positions, frequencies, dtype)
    name = (id(given), frequencies, dtype)
    known = _GIVEN.get(name)
    if known is None or not known.serves(given):
        with torch.inference_mode(False), torch.no_grad():
            table = compute(positions, frequencies, dtype)
        known = _GIVEN[name] = _Given.of(given, table, lambda _: _GIVEN.pop(name, None))
        while len(_GIVEN) > MAX_GIVEN:
            _GIVEN.popitem(last=False)
    return known.table


@torch.library.custom_op(
    "eotattn::rotary_table",
    mutates_args=(),
    schema="(Tensor positions, float base, float interpolation, int num_pairs, ScalarType dtype) -> Tensor",
)
def _opaque(positions: Tensor, base: float, interpolation: float, num_pairs: int, dtype: torch.dtype) -> Tensor:
    """:func:`compute` as one operator of a graph."""
    return compute(positions, Frequencies(base, interpolation, num_pairs), dtype)


@_opaque.register_fake
def _(positions: Tensor, base: float, interpolation: float, num_pairs: int, dtype: torch.dtype) -> Tensor:
    return positions.new_empty((2, *positions.shape, num_pairs), dtype=dtype)


class _Given(NamedTuple):
    """A table that one tensor of positions has, for both sides and for all layers that get the same tensor."""

    positions: weakref.ref[Tensor]
    version: int
    values: Tensor | None  # on a CPU, where NumPy may write without PyTorch's count of versions
    table: Tensor

    @classmethod
    def of(cls, positions: Tensor, table: Tensor, forget: Callable[[object], object]) -> _Given:
        """``table`` until ``positions`` go."""
        values = positions.clone() if positions.device.type == "cpu" else None
        return cls(weakref.ref(positions, forget), tensor_version(positions), values, table)

    def serves(self, positions: Tensor) -> bool:
        """Whether the table is that of these positions, as they are now."""
        same = self.positions() is positions and self.version == tensor_version(positions)
        return same and (self.values is None or torch.equal(self.values, positions))


_GIVEN: OrderedDict[tuple[int, Frequencies, torch.dtype], _Given] = OrderedDict()
