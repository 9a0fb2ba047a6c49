"""What a learned log-prior on a grid looks like: its map of lags, how local it is and how invariant to shifts.

Legend: H heads, G patches along a side, N = G^2 patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.checks import check_positive_int, require
from eotattn.priors import LogPrior, grid_positions

__all__ = ["GridPriorParts", "describe_grid_log_prior", "grid_log_prior"]


@dataclass(frozen=True, eq=False)
class GridPriorParts:
    """One block's log-prior between the patches of a square grid; rows have mean zero.

    Attributes:
        lag_map: (H, 2 G - 1, 2 G - 1) mean over all pairs of patches with the same lag, query - key, by row and column
            from -(G - 1) to G - 1, nats.
        strength: (H,) standard deviation over all pairs, nats.
        shift_invariance: (H,) share of that variance that the lag alone explains; NaN where there is none.
        distance_ratio: (H,) mean distance of query and key under the induced prior over that under the uniform one:
            below one where the prior is local.
    """

    lag_map: Tensor
    strength: Tensor
    shift_invariance: Tensor
    distance_ratio: Tensor


@torch.no_grad()
def grid_log_prior(prior: LogPrior, grid: int) -> Tensor:
    """(H, N, N) float64 log-prior between the patches of a ``grid`` x ``grid`` image, without the class token, nats."""
    device = next(prior.parameters()).device
    positions = grid_positions(grid, grid, device=device)
    return prior.dense(positions, positions, dtype=torch.float64).cpu()


def describe_grid_log_prior(log_prior: Tensor, grid: int) -> GridPriorParts:
    """Split a log-prior between patches into what depends on the lag and the rest.

    Example:
        >>> flat = describe_grid_log_prior(torch.zeros(2, 9, 9), 3)
        >>> flat.lag_map.shape, flat.distance_ratio.tolist()
        (torch.Size([2, 5, 5]), [1.0, 1.0])
    """
    check_positive_int("describe_grid_log_prior", "grid", grid, minimum=2)
    fits = log_prior.dim() == 3 and log_prior.shape[1:] == (grid**2, grid**2)
    rule, remedy = f"have shape (heads, {grid**2}, {grid**2})", "Leave the class token out"
    require(fits, "describe_grid_log_prior", "log_prior", rule, log_prior, remedy)
    centred = (log_prior - log_prior.mean(-1, keepdim=True)).double()
    lag = _lags(grid)
    side = 2 * grid - 1
    place = ((lag[..., 0] + grid - 1) * side + lag[..., 1] + grid - 1).flatten()
    pairs = torch.bincount(place, minlength=side**2)
    sums = torch.zeros(len(centred), side**2, dtype=torch.float64).index_add_(1, place, centred.flatten(1))
    mean = sums / pairs
    total = centred.square().mean((1, 2))
    explained = _explained(centred, lag, grid)
    distance = lag.double().square().sum(-1).sqrt()
    expected = (log_prior.double().softmax(-1) * distance).sum(-1).mean(-1)
    return GridPriorParts(
        lag_map=mean.unflatten(1, (side, side)),
        strength=total.sqrt(),
        shift_invariance=torch.where(total > 0, explained / total, torch.nan),
        distance_ratio=expected / distance.mean(),
    )


def _lags(grid: int) -> Tensor:
    """(N, N, 2) lag, query - key, of every pair, patches."""
    positions = grid_positions(grid, grid)
    return positions[:, None] - positions[None, :]


def _explained(centred: Tensor, lag: Tensor, grid: int) -> Tensor:
    """(H,) variance of row-centred log-priors that a function of the lag explains best, found by least squares.

    Rows are centred after the function is chosen, since softmax does not see their means.
    """
    side = 2 * grid - 1
    place = (lag[..., 0] + grid - 1) * side + lag[..., 1] + grid - 1
    design = torch.nn.functional.one_hot(place, side**2).double()
    design = (design - design.mean(1, keepdim=True)).flatten(0, 1)
    target = centred.flatten(1).T
    gram = design.T @ design
    solution = torch.linalg.pinv(gram, hermitian=True) @ (design.T @ target)
    return (design @ solution).square().mean(0)
