"""The fit behind implicit priors: cross-validated, with a bootstrap over sequences.

Legend: N sequences, H heads, F folds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eotattn.checks import check_positive, check_positive_int, require
from eotattn.diagnostics.lag_key_model import LagKeyModel, fit_margins
from eotattn.diagnostics.margin_problem import MarginProblem
from eotattn.provenance import Table

__all__ = ["FitOptions", "PriorFit", "fit_problem"]

OWNER = "fit_prior"

Array = NDArray[np.float64]

#: Divergence to the uniform prior that statistics of float32 resolve, nats: ten roundings of logits of 20 nats.
RESOLUTION = 1e-5


@dataclass(frozen=True)
class FitOptions:
    """How a prior is fitted and judged.

    Args:
        num_folds: Folds F of the cross-validation, at least 2; no more than sequences are used.
        num_bootstraps: Resamples for the interval.
        smoothing: Share of the uniform prior mixed into the targets, so that unseen lags stay finite; in (0, 1).
        tolerance: Relative deviation of the margins to stop at.
        seed: Of folds and bootstrap.
    """

    num_folds: int
    num_bootstraps: int
    smoothing: float
    tolerance: float
    seed: int

    def __post_init__(self) -> None:
        check_positive_int(OWNER, "num_folds", self.num_folds, minimum=2)
        check_positive_int(OWNER, "num_bootstraps", self.num_bootstraps)
        check_positive(OWNER, "tolerance", self.tolerance)
        inside = check_positive(OWNER, "smoothing", self.smoothing) < 1
        require(inside, OWNER, "smoothing", "be below one", self.smoothing, "Use the default")


@dataclass(frozen=True, eq=False)
class PriorFit(Table):
    """How much of every head's attention a prior explains.

    Attributes:
        explained: (H,) held-out 1 - E KL(p || prior) / E KL(p || uniform), at most one; NaN with a reason.
        interval: (H, 2) its 2.5% and 97.5% quantiles over a bootstrap of the sequences.
        explained_in_sample: (H,) the same on the sequences of the fit.
        divergence_to_uniform: (H,) E KL(p || uniform) a query, nats.
        deviation: (H,) deviation of the column mass from its target that was left, relative to the total.
        num_sequences: N.
        reasons: H words why a head has no explained share; "" where it has.
    """

    explained: Array
    interval: Array
    explained_in_sample: Array
    divergence_to_uniform: Array
    deviation: Array
    num_sequences: int
    reasons: tuple[str, ...]

    @property
    def holds(self) -> NDArray[np.bool_]:
        """(H,) whether the prior is better than uniform attention on sequences it was not fitted to, interval and all.

        False where nothing is held out, or nothing is to be explained.
        """
        return self.interval[:, 0] > 0  # of NaN, false

    def columns(self) -> dict[str, Array]:
        """One row a head."""
        names = ("explained", "explained_in_sample", "divergence_to_uniform", "deviation", "reasons")
        low, high = self.interval.T
        columns = {"head": np.arange(len(low)), "low": low, "high": high, "holds": self.holds}
        return columns | {name: np.asarray(getattr(self, name)) for name in names}

    def __str__(self) -> str:
        """One line a head."""
        lines = ["head  explained  95% interval      in sample  KL to uniform (nats)"]
        for h in range(len(self.explained)):
            low, high = self.interval[h]
            numbers = (
                f"{self.explained_in_sample[h]:9.3f}  {self.divergence_to_uniform[h]:20.3f}  {self.reasons[h]}".rstrip()
            )
            lines.append(f"{h:4d}  {self.explained[h]:9.3f}  {low:6.3f} to {high:6.3f}  {numbers}")
        return "\n".join(lines)


def fit_problem(problem: MarginProblem, options: FitOptions) -> tuple[LagKeyModel, dict[str, Any]]:
    """Fit the model to all sequences and judge it by cross-validation.

    Every sequence is predicted by a fit to the other folds; the bootstrap resamples sequences with those predictions
    fixed.

    Returns:
        The model, and the fields of :class:`PriorFit` by name.
    """
    everything = torch.arange(problem.present.shape[0])

    def fit(chosen: Tensor) -> tuple[LagKeyModel, Tensor]:
        seen, free = problem.lag_seen, problem.num_free
        groups = problem.groups(chosen)
        return fit_margins(*problem.targets(chosen), groups, lag_seen=seen, num_free=free, tolerance=options.tolerance)

    model, deviation = fit(everything)
    uniform, in_sample = problem.divergences(None, everything), problem.divergences(model, everything)
    explained, interval = _held_out(problem, fit, uniform, options)
    to_uniform = uniform.sum(0) / problem.present.sum()
    is_uniform, is_alone = to_uniform <= RESOLUTION, len(everything) < 2
    alone = "one sequence: none is held out" if is_alone else ""
    numbers = {
        "explained": explained.masked_fill(is_uniform, torch.nan).numpy(),
        "interval": interval.masked_fill(is_uniform[:, None], torch.nan).numpy(),
        "explained_in_sample": _share(in_sample, uniform).masked_fill(is_uniform, torch.nan).numpy(),
        "divergence_to_uniform": to_uniform.numpy(),
        "reasons": tuple("attention is uniform: nothing to explain" if flat else alone for flat in is_uniform),
        "deviation": deviation.numpy(),
        "num_sequences": len(everything),
    }
    return model, numbers


def _held_out(
    problem: MarginProblem,
    fit: Callable[[Tensor], tuple[LagKeyModel, Tensor]],
    uniform: Tensor,
    options: FitOptions,
) -> tuple[Tensor, Tensor]:
    """Explained share (H,) and its interval (H, 2) from cross-validation."""
    count, heads = uniform.shape
    if count < 2:
        return torch.full((heads,), torch.nan), torch.full((heads, 2), torch.nan)
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(count, generator=generator)
    held_out = torch.empty_like(uniform)
    for fold in order.tensor_split(min(options.num_folds, count)):
        others = order[~torch.isin(order, fold)]
        held_out[fold] = problem.divergences(fit(others)[0], fold)
    drawn = torch.randint(count, (options.num_bootstraps, count), generator=generator)
    resampled = 1 - held_out[drawn].sum(1) / uniform[drawn].sum(1)
    quantiles = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=resampled.dtype), dim=0)
    return _share(held_out, uniform), quantiles.T


def _share(divergence: Tensor, uniform: Tensor) -> Tensor:
    return 1 - divergence.sum(0) / uniform.sum(0)
