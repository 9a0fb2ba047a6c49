"""Which keys a causal query sees, decided from positions.

Legend: B batch, Q queries, K keys.

A ``range`` says more than a tensor: that positions are consecutive is known without looking at the numbers, so a
full pass, a decode step and a chunk each take their fastest path without a synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.checks import fail, require
from eotattn.priors.positions import check_positions, consecutive

__all__ = ["Positions", "causal_mask", "resolve_positions"]


@dataclass(frozen=True)
class Positions:
    """Positions of one side of an attention call.

    Args:
        tensor: (L,) or (B, L), tokens; with a trailing axis on grids.
        first: First position if they are known to be consecutive, else ``None``.
        on_grid: Whether the positions are points of a grid.
    """

    tensor: Tensor
    first: int | None = None
    on_grid: bool = False


def resolve_positions(
    owner: str,
    argument: str,
    given: Tensor | range | None,
    *,
    batch: int,
    length: int,
    num_coordinates: int,
    device: torch.device,
) -> Positions:
    """Check what the caller gave against the tokens there are; ``None`` means 0, 1, 2, ...

    Raises:
        ValueError: If the number, batch or coordinates of the positions do not fit, or the device differs.
        TypeError: If the argument is neither a tensor nor a range.
    """
    on_grid = num_coordinates > 1
    if given is None or isinstance(given, range):
        rule = "be given explicitly to a prior on grids"
        require(not on_grid, owner, argument, rule, given, "Pass grid_positions(height, width)")
        first = 0
        if isinstance(given, range):
            first = given.start
            require(given.step == 1, owner, argument, "be a range of step one", given, "Pass a tensor instead")
            if given.stop - first != length:
                fail(owner, argument, f"have length {length}", given, "One position a token")
        return Positions(consecutive(first, length, device), first)
    remedy = "Pass a tensor, a range, or nothing for 0, 1, 2, ..."
    require(isinstance(given, Tensor), owner, argument, "be a tensor or a range", given, remedy, error=TypeError)
    tail = (num_coordinates,) if on_grid else ()
    shape = tuple(given.shape)
    if shape not in [(length, *tail), (1, length, *tail), (batch, length, *tail)]:
        wanted = f"{(length, *tail)} or {(batch, length, *tail)}"
        fail(owner, argument, f"have shape {wanted}", given, "One position a token")
    if given.device != device:
        fail(owner, argument, f"be on {device}", given, "Move it to the query's device")
    check_positions(owner, argument, given, num_coordinates)
    return Positions(given, None, on_grid)


def causal_mask(query: Positions, key: Positions) -> Tensor | bool:
    """Which keys lie at or before each query.

    Returns:
        ``True`` if the pattern is the triangle that kernels know (query index i sees key indices 0 to i), ``False`` if
        every key is visible, else a boolean mask (Q, K) or (B, 1, Q, K), true where visible.
    """
    queries, keys = query.tensor.shape[-1], key.tensor.shape[-1]
    if query.first is not None and key.first is not None:
        if query.first == key.first and queries == keys:
            return True
        if query.first >= key.first + keys - 1:
            return False
    visible = key.tensor.unsqueeze(-2) <= query.tensor.unsqueeze(-1)
    return visible.unsqueeze(1) if visible.dim() == 3 else visible
