"""Positions: how they are checked, paired and looked up.

Legend: B batch, H heads, Q queries, K keys, C coordinates.

A position is one number a token on a sequence, C numbers on a grid. Positions are always explicit, one row for the
whole batch or one row a sample, so that caches, chunks, shards and packed batches are offsets, not special cases.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eotattn.checks import check_no_nan, require
from eotattn.priors.memory import is_plain, may_remember, remembered

__all__ = ["check_positions", "consecutive", "pair_positions", "position_lookup", "table_lookup"]


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


def table_lookup(table: Tensor, *, has_batch: bool) -> Callable[..., Tensor]:
    """A function (batch, index, ...) -> entry of a table (L, ...) or (B, L, ...), whose single row serves all."""
    if not has_batch or table.shape[0] == 1:
        rows = table[0] if has_batch else table
        return lambda batch, *index: rows[index]
    return lambda *index: table[index]


def position_lookup(positions: Tensor | None, num_coordinates: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (batch, index) -> position in float32; without positions, the index itself."""
    if positions is None:
        return lambda batch, index: index.float()
    return table_lookup(positions.float(), has_batch=positions.dim() > (1 if num_coordinates == 1 else 2))


def consecutive(first: int, length: int, device: torch.device) -> Tensor:
    """The positions first, first + 1, ... as (length,) int64, made once; not to be written to.

    Example:
        >>> consecutive(3, 2, torch.device("cpu"))
        tensor([3, 4])
    """
    if not may_remember(device):
        return torch.arange(first, first + length, device=device)
    key = ("consecutive", first, length)
    return remembered(key, device, lambda: torch.arange(first, first + length, device=device))
