"""Positions of a call, and which keys a causal query sees.

Legend: B batch, L tokens, Q queries, K keys.

Consecutive positions are known without looking at numbers, so a full pass, a decoding step and a chunk each take their
fastest path without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from eotattn.checks import fail, require
from eotattn.compat import context_parallel_region
from eotattn.priors.prior_positions import check_positions, consecutive

__all__ = ["Band", "GivenPositions", "Positions", "Shard", "causal_pattern", "resolve_positions", "static_size"]

#: What a user may give: one position a token, or consecutive ones by a range or by the first.
GivenPositions: TypeAlias = Tensor | range | int | Sequence[int] | None


@dataclass(frozen=True)
class Shard:
    """Consecutive tokens that processes share as PyTorch's ``context_parallel`` shares them.

    Args:
        first: Position of the first token of all.
        total: Tokens of all processes together.
        rank: Which process this is.
        count: Processes.
        is_balanced: Whether process i holds parts i and 2 * count - 1 - i of equal length, or part i of ``count``.
    """

    first: int
    total: int
    rank: int
    count: int
    is_balanced: bool

    @classmethod
    def here(cls, first: int, length: int) -> Shard | None:
        """That of ``length`` tokens held by this process, in ``context_parallel``; ``None`` outside of it."""
        region = context_parallel_region()
        return None if region is None else cls(first, length * region[1], *region)

    @property
    def offset(self) -> int:
        """Tokens of others before the first one of this process."""
        return self.rank * (self.total // self.count // (1 + self.is_balanced))

    def positions(self, device: torch.device) -> Tensor:
        """(L,) int64, those that this process holds."""
        length, start = self.total // self.count, self.first + self.offset
        if not self.is_balanced:
            return consecutive(start, length, device)
        last = self.first + self.total - self.offset - length // 2
        return torch.cat([consecutive(at, length // 2, device) for at in (start, last)])


@dataclass(frozen=True)
class Positions:
    """Positions of one side of an attention call.

    Args:
        given: (L,) or (B, L), tokens; with a trailing axis on grids. ``None`` where they are consecutive.
        first: First position if they are known to be consecutive, else ``None``.
        length: Tokens L.
        device: Device of the tokens.
        on_grid: Whether the positions are points of a grid.
        largest: No position is further from zero, where that is known.
        shard: What they are of the positions of all processes, in ``context_parallel``.
    """

    given: Tensor | None
    first: int | None
    length: int
    device: torch.device
    on_grid: bool = False
    largest: int | None = None
    shard: Shard | None = None

    @property
    def run(self) -> tuple[int, int] | None:
        """First position and number of the consecutive ones that these are, or that processes share; else ``None``."""
        if self.shard is not None:
            return self.shard.first, self.shard.total
        return None if self.first is None else (self.first, self.length)

    @property
    def tensor(self) -> Tensor:
        """The positions as they were given, or (L,) int64, made when they are asked for."""
        if self.given is not None:
            return self.given
        assert self.first is not None
        return consecutive(self.first, self.length, self.device)


@dataclass(frozen=True)
class Band:
    """A causal pattern of indices: query i sees keys i + offset - window + 1 to i + offset, all of which exist.

    Args:
        offset: Keys before the first query, at least 0.
        window: Keys that a query sees at most, itself included; ``None`` for all.
    """

    offset: int = 0
    window: int | None = None

    @property
    def is_triangle(self) -> bool:
        """Whether it is the pattern that every kernel knows: query i sees keys 0 to i."""
        return self.window is None and self.offset == 0

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(Q, K) boolean, true where visible."""
        # sums, not tril, whose diagonal a graph holds fixed
        last, at = torch.arange(queries, device=device).unsqueeze(-1) + self.offset, torch.arange(keys, device=device)
        return at <= last if self.window is None else (at <= last) & (at > last - self.window)


def resolve_positions(
    owner: str,
    argument: str,
    given: GivenPositions,
    *,
    batch: int,
    length: int,
    device: torch.device,
    num_coordinates: int = 1,
) -> Positions:
    """Check what the caller gave against the tokens there are; ``None`` means 0, 1, 2, ...

    Raises:
        ValueError: If the number, batch or coordinates of the positions do not fit, or the device differs.
        TypeError: If the argument is none of what may be given.
    """
    on_grid = num_coordinates > 1
    if (shard := Shard.here(0, length)) is not None:
        return _of_shard(owner, argument, given, shard, Positions(None, None, length, device, on_grid))
    if given is None and not on_grid:
        return Positions(None, 0, length, device)
    if isinstance(given, int) and not isinstance(given, bool) and not on_grid:
        given = range(given, given + length)
    if given is None or isinstance(given, range):
        rule = "be given explicitly to a prior on grids"
        require(not on_grid, owner, argument, rule, given, "Pass grid_positions(height, width)")
        assert isinstance(given, range)
        require(given.step == 1, owner, argument, "be a range of step one", given, "Pass a tensor instead")
        if len(given) != length:
            fail(owner, argument, f"have length {length}", given, "One position a token")
        return Positions(None, given.start, length, device)
    if not isinstance(given, Tensor):
        given = _as_tensor(owner, argument, given, device)
    row = (length, num_coordinates) if on_grid else (length,)
    shape, axes = tuple(given.shape), given.dim() - len(row)  # axes first: sizes that differ by chance guard a graph
    if axes not in (0, 1) or shape[axes:] != row or (axes == 1 and shape[0] not in (1, batch)):
        fail(owner, argument, f"have shape {row} or {(batch, *row)}", given, "One position a token")
    if given.device != device:
        fail(owner, argument, f"be on {device}", given, "Move it to the query's device")
    check_positions(owner, argument, given, num_coordinates)
    if given.dtype not in (torch.int64, torch.int32):  # differences of narrow numbers wrap or round
        given = given.to(torch.float64 if given.is_floating_point() else torch.int64)
    return Positions(given, None, length, device, on_grid)


def _of_shard(owner: str, argument: str, given: GivenPositions, shard: Shard, at: Positions) -> Positions:
    """Positions in ``context_parallel``: those of the engine's shards, whose order its causality is of."""
    require(not at.on_grid, owner, argument, "lie on a sequence in context_parallel", "a grid", "Attend outside of it")
    remedy = "Name the tokens among its buffers, so that shards are equal"
    parts = 1 + shard.is_balanced
    require(at.length % parts == 0, owner, argument, f"be a multiple of {parts} in context_parallel", at.length, remedy)
    if given is None or isinstance(given, int):
        shard = replace(shard, first=given or 0)
        return replace(at, given=shard.positions(at.device), shard=shard)
    tensor = torch.as_tensor(given, device=at.device)
    fits = tensor.dim() in (1, 2) and tensor.shape[-1] == at.length and 0 not in tensor.shape
    if fits:  # waits for the device, which positions that are left out do not
        shard = replace(shard, first=int(tensor.flatten()[0]) - shard.offset)
        fits = bool((tensor == shard.positions(at.device)).all())
    rule, remedy = "be this process's shard of consecutive ones in context_parallel", "Leave them out"
    require(fits, owner, argument, rule, given, remedy)
    return replace(at, given=shard.positions(at.device), shard=shard)


def _as_tensor(owner: str, argument: str, given: Any, device: torch.device) -> Tensor:
    """A list or an array as a tensor."""
    remedy = "Pass a tensor, a list, a range, the first position, or nothing for 0, 1, 2, ..."
    known = isinstance(given, (list, tuple)) or hasattr(given, "__array__")
    require(known, owner, argument, "be positions", given, remedy, error=TypeError)
    try:
        return torch.as_tensor(given).to(device)
    except (TypeError, ValueError, RuntimeError):
        return fail(owner, argument, "hold one number a token", given, remedy, error=TypeError)


def static_size(size: int) -> int:
    """A size as a number, also where a graph is traced whose sizes are symbols: the graph is then of this size."""
    if not torch.compiler.is_compiling():
        return size
    number = 1
    while number != size:
        number += 1
    return number


def causal_pattern(query: Positions, key: Positions, window: int | None = None) -> Band | Tensor | None:
    """Which keys lie at or before each query, and less than ``window`` tokens before it.

    Returns:
        A :class:`Band` of indices where positions are known to be consecutive, ``None`` if every key is visible, else a
        boolean mask (Q, K) or (B, 1, Q, K), true where visible.
    """
    queries, keys = query.length, key.length
    if query.shard is not None:  # the engine reads the triangle as that of all processes' tokens
        return Band()
    if query.first is not None and key.first is not None:
        offset = query.first - key.first
        window = None if window is not None and window >= queries + offset else window
        if offset == 0 and queries == keys:
            return Band(0, window)
        if window is None and offset >= keys - 1:
            return None
        if offset >= 0 and keys >= queries + offset:
            return Band(offset, window)
    lag = query.tensor.unsqueeze(-1) - key.tensor.unsqueeze(-2)
    visible = lag >= 0 if window is None else (lag >= 0) & (lag < window)
    return visible.unsqueeze(1) if visible.dim() == 3 else visible
