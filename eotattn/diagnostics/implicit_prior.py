"""The implicit prior of a head: how much of its attention is a function of position alone.

Legend: N sequences, H heads, L positions, F folds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eotattn.attention.running import SequenceStatistics
from eotattn.checks import check_positive, check_positive_int, require
from eotattn.diagnostics.lag_key_model import LagKeyModel, fit_margins
from eotattn.diagnostics.margin_problem import MarginProblem
from eotattn.priors import LogPrior, TablePrior
from eotattn.priors.key_table import KeyTablePrior

__all__ = ["ImplicitPriorReport", "fit_prior"]

OWNER = "fit_prior"

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ImplicitPriorReport:
    """The two-part prior of every head, and how much of its attention that prior explains on other sequences.

    Attributes:
        lag: (H, 2 L - 1) a_t for lags -(L - 1) to L - 1, nats; NaN at inadmissible lags.
        key: (H, L) v_j, nats; NaN at keys that no sequence has. Gauge: sum_j v_j = 0 and sum_j j v_j = 0.
        explained: (H,) held-out 1 - E KL(p || prior) / E KL(p || uniform), at most one; NaN below two sequences.
        interval: (H, 2) its 2.5% and 97.5% quantiles over a bootstrap of the sequences.
        explained_in_sample: (H,) the same on the sequences of the fit.
        divergence_to_uniform: (H,) E KL(p || uniform) a query, nats.
        deviation: (H,) deviation of the column mass from its target that was left, relative to the total.
        num_sequences: N.
        is_causal: Whether only keys up to the query are admissible.
    """

    lag: Array
    key: Array
    explained: Array
    interval: Array
    explained_in_sample: Array
    divergence_to_uniform: Array
    deviation: Array
    num_sequences: int
    is_causal: bool

    @property
    def lags(self) -> NDArray[np.int64]:
        """(2 L - 1,) lags of :attr:`lag`, tokens."""
        reach = self.key.shape[1]
        return np.arange(1 - reach, reach)

    def prior(self) -> LogPrior:
        """The fitted prior, a :class:`TablePrior` plus a :class:`KeyTablePrior`, for any attention call.

        Inadmissible lags repeat the nearest admissible one: masks stay masks.
        """
        heads, length = self.key.shape
        relative, key_only = TablePrior(heads, length - 1), KeyTablePrior(heads, length)
        with torch.no_grad():
            relative.table.copy_(torch.from_numpy(_filled(self.lag)))
            key_only.table.copy_(torch.from_numpy(_filled(self.key)))
        return relative + key_only

    def to_dict(self) -> dict[str, NDArray[np.generic]]:
        """Arrays by name."""
        names = ("lags", "lag", "key", "explained", "interval", "explained_in_sample", "divergence_to_uniform")
        return {name: np.asarray(getattr(self, name)) for name in (*names, "deviation")}

    def __str__(self) -> str:
        """One line a head."""
        lines = ["head  explained  95% interval      in sample  KL to uniform (nats)"]
        for h in range(len(self.explained)):
            low, high = self.interval[h]
            numbers = f"{self.explained_in_sample[h]:9.3f}  {self.divergence_to_uniform[h]:20.3f}"
            lines.append(f"{h:4d}  {self.explained[h]:9.3f}  {low:6.3f} to {high:6.3f}  {numbers}")
        return "\n".join(lines)


def fit_prior(
    statistics: SequenceStatistics,
    *,
    is_causal: bool | None = None,
    window: int | None = None,
    num_folds: int = 4,
    num_bootstraps: int = 500,
    smoothing: float = 1e-6,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> ImplicitPriorReport:
    """Fit pi_ij proportional to exp(a_(i-j) + v_j) to the attention of every head by minimising E KL(p_i || pi_i).

    The problem is convex; lag mass and column mass are its sufficient statistics, entropy gives the value. Sequences
    may differ in length. Every sequence is predicted by a fit to the other folds; the bootstrap resamples sequences
    with those predictions fixed.

    Args:
        statistics: Of one layer; every sequence whole, from its first token (cached decoding is whole).
        is_causal: Whether only keys up to the query are admissible; by default read off the lag mass.
        window: Sliding window, tokens.
        num_folds: Folds F of the cross-validation, at least 2; no more than sequences are used.
        num_bootstraps: Resamples for the interval.
        smoothing: Share of the uniform prior mixed into the targets, so that unseen lags stay finite; in (0, 1).
        tolerance: Relative deviation of the margins to stop at.
        seed: Of folds and bootstrap.

    Returns:
        :class:`ImplicitPriorReport`; ``deviation`` above ``tolerance`` says that a fit has not converged.

    Raises:
        ValueError: If no query is there, or rows do not sum to one because of an explicit sink.

    Source:
        Original.

    Example:
        >>> from eotattn.attention.statistics import row_statistics
        >>> query, key = torch.randn(2, 8, 3, 16, 4, generator=torch.Generator().manual_seed(0))
        >>> report = fit_prior(SequenceStatistics.of(row_statistics(query, key, is_causal=True)))
        >>> report.prior().dense(torch.arange(3), torch.arange(3)).shape
        torch.Size([3, 3, 3])
    """
    _check(statistics, num_folds, num_bootstraps, smoothing)
    check_positive(OWNER, "tolerance", tolerance)
    problem = MarginProblem.of(statistics, is_causal, window, smoothing)
    everything = torch.arange(statistics.num_sequences)

    def fit(chosen: Tensor) -> tuple[LagKeyModel, Tensor]:
        targets = problem.targets(chosen)
        seen, groups = problem.lag_seen, problem.groups(chosen)
        return fit_margins(*targets, groups, lag_seen=seen, tolerance=tolerance)

    model, deviation = fit(everything)
    uniform, in_sample = problem.divergences(None, everything), problem.divergences(model, everything)
    explained, interval = _held_out(problem, fit, uniform, num_folds, num_bootstraps, seed)
    lag, key = _gauged(model, problem.lag_seen, problem.key_count(everything) > 0)
    queries = problem.lengths.sum()
    return ImplicitPriorReport(
        lag=lag.numpy(),
        key=key.numpy(),
        explained=explained.numpy(),
        interval=interval.numpy(),
        explained_in_sample=_share(in_sample, uniform).numpy(),
        divergence_to_uniform=(uniform.sum(0) / queries).numpy(),
        deviation=deviation.numpy(),
        num_sequences=statistics.num_sequences,
        is_causal=problem.is_causal,
    )


def _held_out(
    problem: MarginProblem,
    fit: Callable[[Tensor], tuple[LagKeyModel, Tensor]],
    uniform: Tensor,
    num_folds: int,
    num_bootstraps: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Explained share (H,) and its interval (H, 2) from cross-validation."""
    count, heads = uniform.shape
    if count < 2:
        return torch.full((heads,), torch.nan), torch.full((heads, 2), torch.nan)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    held_out = torch.empty_like(uniform)
    for fold in order.tensor_split(min(num_folds, count)):
        others = order[~torch.isin(order, fold)]
        held_out[fold] = problem.divergences(fit(others)[0], fold)
    drawn = torch.randint(count, (num_bootstraps, count), generator=generator)
    resampled = 1 - held_out[drawn].sum(1) / uniform[drawn].sum(1)
    quantiles = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=resampled.dtype), dim=0)
    return _share(held_out, uniform), quantiles.T


def _share(divergence: Tensor, uniform: Tensor) -> Tensor:
    return 1 - divergence.sum(0) / uniform.sum(0)


def _gauged(model: LagKeyModel, lag_seen: Tensor, key_seen: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms with sum_j v_j = sum_j j v_j = 0: the slope that softmax cannot see goes to the lags."""
    lag, key = model.lag.clamp(min=1e-300).log(), model.key.clamp(min=1e-300).log()
    position = torch.arange(key.shape[-1], dtype=key.dtype)
    seen = key_seen.double()
    centred = (position - (position * seen).sum() / seen.sum()) * seen
    mean = (key * seen).sum(-1, keepdim=True) / seen.sum()
    slope = (key * centred).sum(-1, keepdim=True) / centred.square().sum().clamp(min=1.0)
    key = key - mean - slope * centred
    lag = lag - slope * torch.arange(1 - key.shape[-1], key.shape[-1], dtype=key.dtype)
    return torch.where(lag_seen, lag, torch.nan), torch.where(key_seen, key, torch.nan)


def _filled(values: Array) -> Array:
    """NaN replaced by the nearest number of the row."""
    known = np.flatnonzero(~np.isnan(values[0]))
    nearest = known[np.abs(np.arange(values.shape[1])[:, None] - known).argmin(1)]
    return values[:, nearest]


def _check(statistics: SequenceStatistics, num_folds: int, num_bootstraps: int, smoothing: float) -> None:
    check_positive_int(OWNER, "num_folds", num_folds, minimum=2)
    check_positive_int(OWNER, "num_bootstraps", num_bootstraps)
    inside = check_positive(OWNER, "smoothing", smoothing) < 1
    require(inside, OWNER, "smoothing", "be below one", smoothing, "Use the default")
    queries = statistics.num_queries
    full = bool((queries >= 1).all())
    require(full, OWNER, "statistics", "have a query in every sequence", queries.tolist(), "Drop the empty ones")
    sink = float(statistics.sums["explicit_sink_mass"].sum())
    require(sink == 0, OWNER, "statistics", "have no explicit sink", sink, "Rows must sum to one")
    total = statistics.lag_mass.sum(-1) / queries[:, None]
    whole = bool(((total - 1).abs() < 1e-2).all())
    require(whole, OWNER, "statistics", "have rows that sum to one", float(total.min()), "Pass whole rows")
