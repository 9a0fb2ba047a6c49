"""The implicit prior of a head that attends on a grid: a table of lags in two axes, a table of cells, a class token.

Legend: N sequences, H heads, h rows, w columns, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eotattn.checks import require
from eotattn.diagnostics.grid_statistics import GridStatistics, grid_line
from eotattn.diagnostics.lag_key_model import LagKeyModel
from eotattn.diagnostics.margin_problem import MarginProblem
from eotattn.diagnostics.prior_fit import FitOptions, PriorFit, fit_problem
from eotattn.priors import ClassTokenPrior, GridKeyPrior, GridTablePrior, LogPrior

__all__ = ["GridPriorReport", "fit_grid_prior"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class GridPriorReport(PriorFit):
    """The two-part prior of every head on a grid, and how much of its attention that prior explains elsewhere.

    Attributes:
        lag: (H, 2 h - 1, 2 w - 1) a by row lag and column lag, query - key, nats.
        key: (H, h, w) v by the key's cell, nats; they sum to zero. Without a class token softmax sees neither a plane
            in v (it goes to the lags) nor a constant in a (its mean is zero).
        class_token: (H,) v of the class token, nats; NaN where the grid has none.
    """

    lag: Array
    key: Array
    class_token: Array

    @property
    def has_class_token(self) -> bool:
        """Whether one token lies off the grid."""
        return bool(np.isfinite(self.class_token).all())

    def prior(self) -> LogPrior:
        """The fitted prior on :func:`eotattn.grid_positions`, for any attention call."""
        heads, height, width = self.key.shape
        relative, key_only = GridTablePrior(heads, height, width), GridKeyPrior(heads, height, width)
        with torch.no_grad():
            relative.table.copy_(torch.from_numpy(self.lag))
            key_only.table.copy_(torch.from_numpy(self.key))
        if not self.has_class_token:
            return relative + key_only
        class_token = ClassTokenPrior(heads)
        with torch.no_grad():
            class_token.class_token.copy_(torch.from_numpy(self.class_token))
        return relative + key_only + class_token

    def to_dict(self) -> dict[str, NDArray[np.generic]]:
        """Arrays by name."""
        names = ("lag", "key", "class_token", "explained", "interval", "explained_in_sample", "divergence_to_uniform")
        return {name: np.asarray(getattr(self, name)) for name in (*names, "deviation")}


def fit_grid_prior(
    statistics: GridStatistics,
    *,
    num_folds: int = 4,
    num_bootstraps: int = 500,
    smoothing: float = 1e-6,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> GridPriorReport:
    """Fit pi_ij proportional to exp(a_(row lag, column lag) + v_j) to every head by minimising E KL(p_i || pi_i).

    A class token lies nowhere, so no lag reaches it: as a query it sees v alone, as a key it has a number of its own.
    Otherwise as :func:`eotattn.diagnostics.fit_prior`, which this solves on a line that the grid is laid out on.

    Args:
        statistics: Of one layer, from a capture with ``grid=(h, w)`` or from stored maps.
        num_folds: Folds of the cross-validation, at least 2; no more than sequences are used.
        num_bootstraps: Resamples for the interval.
        smoothing: Share of the uniform prior mixed into the targets; in (0, 1).
        tolerance: Relative deviation of the margins to stop at.
        seed: Of folds and bootstrap.

    Returns:
        :class:`GridPriorReport`; ``deviation`` above ``tolerance`` says that a fit has not converged.

    Source:
        Original.

    Example:
        >>> from eotattn.attention.statistics.score_rows import WeightRows
        >>> weights = torch.rand(4, 2, 7, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
        >>> fit_grid_prior(GridStatistics.of(WeightRows(weights), 2, 3)).lag.shape
        (2, 3, 5)
    """
    known, remedy = isinstance(statistics, GridStatistics), "Capture a model with grid=(height, width)"
    require(known, "fit_grid_prior", "statistics", "be GridStatistics", statistics, remedy, error=TypeError)
    options = FitOptions(num_folds, num_bootstraps, smoothing, tolerance, seed)
    problem = MarginProblem.of_grid(statistics, smoothing)
    model, numbers = fit_problem(problem, options)
    lag, key, class_token = _gauged(model, statistics.height, statistics.width)
    return GridPriorReport(**numbers, lag=lag.numpy(), key=key.numpy(), class_token=class_token.numpy())


def _gauged(model: LagKeyModel, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms by axis, with everything that softmax does not see removed."""
    lag = model.lag.clamp(min=1e-300).log().unflatten(-1, (2 * height - 1, 2 * width - 1))
    key = model.key[:, grid_line(height, width)].clamp(min=1e-300).log()
    mean = key.mean(-1, keepdim=True)
    key = (key - mean).unflatten(-1, (height, width))
    if model.num_free:
        return lag, key, model.key[:, -1].log() - mean.squeeze(-1)
    for axis, size in ((-2, height), (-1, width)):
        at = torch.arange(size, dtype=key.dtype) - (size - 1) / 2
        lags = torch.arange(1 - size, size, dtype=key.dtype)
        shape = (-1, 1) if axis == -2 else (-1,)
        slope = (key * at.view(shape)).mean((-2, -1), keepdim=True) / at.square().mean().clamp(min=1e-12)
        key, lag = key - slope * at.view(shape), lag - slope * lags.view(shape)
    return lag - lag.mean((-2, -1), keepdim=True), key, key.new_full(key.shape[:1], torch.nan)
