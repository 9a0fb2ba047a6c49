"""Positions: how they are checked, paired and looked up.

Legend: B batch, H heads, Q queries, K keys, C coordinates.

A position is one number a token on a sequence, C numbers on a grid. Positions are always explicit, one row for the
whole batch or one row a sample, so that caches, chunks, shards and packed batches are offsets, not special cases.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from threading import RLock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from eotattn.checks import check_no_nan, require

__all__ = [
    "check_positions",
    "consecutive",
    "constants",
    "is_plain",
    "may_remember",
    "pair_positions",
    "position_lookup",
    "run_table",
]

#: Tables remembered for each device and stream; the least recently used one goes first.
MAX_TABLES = 24
#: Tuples of constants remembered.
MAX_CONSTANTS = 256


def check_positions(owner: str, argument: str, positions: Tensor | None, num_coordinates: int) -> None:
    """Raise unless ``positions`` is a non-empty real tensor (L,) or (B, L), with a trailing axis C on grids."""
    is_grid = num_coordinates > 1
    wanted = f"(L, {num_coordinates}) or (B, L, {num_coordinates})" if is_grid else "(L,) or (B, L)"
    remedy = "Pass one position a token"
    if not isinstance(positions, Tensor):
        raise TypeError(f"{owner}: {argument} must be a tensor of shape {wanted}; got {positions!r}. {remedy}.")
    fits = positions.dim() in ((2, 3) if is_grid else (1, 2))
    fits = fits and (not is_grid or positions.shape[-1] == num_coordinates)
    require(fits, owner, argument, f"have shape {wanted}", positions, remedy)
    require(positions.numel() > 0, owner, argument, "not be empty", positions, "Pass at least one token")
    is_real = not positions.is_complex() and positions.dtype != torch.bool
    require(is_real, owner, argument, "hold real numbers", positions, "Cast it", error=TypeError)
    if positions.is_floating_point() and is_plain():
        check_no_nan(owner, argument, positions)


def pair_positions(query_positions: Tensor, key_positions: Tensor, num_coordinates: int) -> tuple[Tensor, Tensor]:
    """Checked positions in float64 that broadcast to (H, Q, K) or (B, H, Q, K), coordinates last on grids."""
    last = -1 if num_coordinates == 1 else -2
    query = query_positions.double().unsqueeze(last)
    key = key_positions.double().unsqueeze(last - 1)
    with_batch = 3 if num_coordinates == 1 else 4
    query = query.unsqueeze(1) if query.dim() == with_batch else query
    key = key.unsqueeze(1) if key.dim() == with_batch else key
    return query, key


def position_lookup(positions: Tensor | None, num_coordinates: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (batch, index) -> position in float32; without positions, the index itself."""
    if positions is None:
        return lambda batch, index: index.float()
    table = positions.float()
    if positions.dim() == (1 if num_coordinates == 1 else 2):
        return lambda batch, index: table[index]
    return lambda batch, index: table[batch, index]


@dataclass
class _Run:
    """The positions 0, 1, 2, ... up to a power of two, and tables of what was computed from them."""

    positions: Tensor
    tables: OrderedDict[Hashable, Tensor] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.length = self.positions.shape[0]
        self.version = self.positions._version  # a caller who writes into the slice it got makes the run useless


_RUNS: dict[tuple[torch.device, int], _Run] = {}
_CONSTANTS: dict[tuple[tuple[float, ...], torch.device, torch.dtype], Tensor] = {}
_LOCK = RLock()


def may_remember(device: torch.device) -> bool:
    """Whether tensors made now can be kept for later calls: not while compiling, transforming or capturing a graph."""
    if device.type not in ("cpu", "cuda") or not is_plain():
        return False
    return device.type == "cpu" or not torch.cuda.is_current_stream_capturing()


def is_plain() -> bool:
    """Whether tensors are what they seem: nothing is compiled, transformed or dispatched to a mode."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def consecutive(first: int, length: int, device: torch.device) -> Tensor:
    """The positions first, first + 1, ... as (length,) int64: a slice of one long run, so that tables can be shared.

    Example:
        >>> consecutive(3, 2, torch.device("cpu"))
        tensor([3, 4])
    """
    if not may_remember(device) or first < 0:
        return torch.arange(first, first + length, device=device)
    return _run_to(first + length, device).positions[first : first + length]


def run_table(name: Hashable, last: int, device: torch.device, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """``compute`` of the positions 0, 1, 2, ... up to ``last`` or further, remembered; for :func:`may_remember`.

    Args:
        name: Identifies the function: equal names, equal values.
        last: One more than the last position wanted.
        device: Where.
        compute: A pure function of positions, elementwise along its first axis and without gradients.
    """
    return _table(_run_to(last, device), name, compute)


def _run_to(last: int, device: torch.device) -> _Run:
    """A run of at least ``last`` positions."""
    place = _place(device)
    run = _RUNS.get(place)
    if run is not None and run.length >= last and run.positions._version == run.version:
        return run
    with _LOCK, torch.inference_mode(False):
        run = _RUNS[place] = _Run(torch.arange(max(1024, 1 << (last - 1).bit_length()), device=device))
    return run


def _table(run: _Run, name: Hashable, compute: Callable[[Tensor], Tensor]) -> Tensor:
    with _LOCK:
        table = run.tables.get(name)
        if table is None:
            with torch.inference_mode(False), torch.no_grad():
                table = run.tables[name] = compute(run.positions)
            while len(run.tables) > MAX_TABLES:
                run.tables.popitem(last=False)
        else:
            run.tables.move_to_end(name)
    return table


def constants(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """``numbers`` as (n,) on ``device``, put there once; not to be written to."""
    if not numbers:
        return torch.empty(0, dtype=dtype, device=device)
    held = None if torch.compiler.is_compiling() else _CONSTANTS.get((numbers, device, dtype))
    if held is None:
        if not may_remember(device):
            # filled in on the device: a copy from the host would keep CUDA graphs from being captured
            return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])
        with torch.inference_mode(False):
            held = torch.tensor(numbers, dtype=dtype, device=device)
        with _LOCK:
            if len(_CONSTANTS) >= MAX_CONSTANTS:
                _CONSTANTS.clear()
            _CONSTANTS[numbers, device, dtype] = held
    return held


def _place(device: torch.device) -> tuple[torch.device, int]:
    """A device and its current stream: what another stream computes may not be there yet."""
    return device, torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
