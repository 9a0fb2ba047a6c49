"""The implicit prior of a head: how much of its attention is a function of position alone.

Legend: N sequences, H heads, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.checks import check_positive_int, require
from eotattn.diagnostics.lag_key_model import LagKeyModel, RowGroup
from eotattn.diagnostics.margin_problem import MarginProblem
from eotattn.diagnostics.prior_fit import FitOptions, PriorFit, fit_problem
from eotattn.priors import FourierPrior, KeyTablePrior, LogPrior, RelativeBiasPrior

__all__ = ["ImplicitPriorReport", "fit_prior"]

OWNER = "fit_prior"

#: Ridge on the amplitudes of waves, against a design whose columns have squares of about a half: waves of nearly equal
#: periods must not grow large and cancel, which no kernel's arithmetic would forgive.
RIDGE = 1e-6

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ImplicitPriorReport(PriorFit):
    """The two-part prior of every head, and how much of its attention that prior explains on other sequences.

    Attributes:
        lag: (H, 2 L - 1) a_t for lags -(L - 1) to L - 1, nats; NaN at inadmissible lags.
        key: (H, L) v_j, nats; NaN at keys that no sequence has. Gauge: sum_j v_j = 0 and sum_j j v_j = 0.
        is_causal: Whether only keys up to the query are admissible.
    """

    lag: Array
    key: Array
    is_causal: bool

    @property
    def lags(self) -> NDArray[np.int64]:
        """(2 L - 1,) lags of :attr:`lag`, tokens."""
        reach = self.key.shape[1]
        return np.arange(1 - reach, reach)

    def prior(self) -> LogPrior:
        """The fitted prior, a :class:`RelativeBiasPrior` plus a :class:`KeyTablePrior`, for any attention call.

        Inadmissible lags repeat the nearest admissible one: masks stay masks. A free table of lags has no lanes; see
        :meth:`factored`.
        """
        heads, length = self.key.shape
        relative = RelativeBiasPrior(heads, length - 1)
        with torch.no_grad():
            relative.table.copy_(torch.from_numpy(_filled(self.lag)))
        return relative + self._key_prior()

    def factored(self, *, num_frequencies: int = 16) -> LogPrior:
        """The fitted prior with lanes, so that any fused kernel carries it: waves instead of the table of lags.

        Waves of geometric periods, up to eight times the length, are fitted to the table by least squares; a lag counts
        by the weight that the prior itself gives it on a sequence of full length. Compare :meth:`prior` to see what is
        lost; more frequencies lose less.

        Args:
            num_frequencies: Waves; the prior has two lanes for each and one for the keys, before splitting.
        """
        check_positive_int("ImplicitPriorReport.factored", "num_frequencies", num_frequencies)
        heads, length = self.key.shape
        waves = FourierPrior(heads, num_frequencies, min_period=2.5, max_period=max(8.0 * length, 2.5))
        lags = torch.from_numpy(self.lags)
        basis = torch.cat([torch.ones(len(lags), 1), waves.key_features(lags.double())], -1).double()
        weight = self._lag_weight().sqrt()[..., None]  # the constant is free: softmax does not see it
        table = torch.from_numpy(np.nan_to_num(self.lag))[..., None]
        weighted = weight * basis
        ridge = RIDGE * torch.eye(basis.shape[-1], dtype=torch.float64)
        solved = torch.linalg.solve(weighted.mT @ weighted + ridge, weighted.mT @ (weight * table)).squeeze(-1)
        with torch.no_grad():
            waves.even.copy_(solved[:, 1 : 1 + num_frequencies])
            waves.odd.copy_(solved[:, 1 + num_frequencies :])
        return waves + self._key_prior()

    def _key_prior(self) -> LogPrior:
        key_only = KeyTablePrior(*self.key.shape)
        with torch.no_grad():
            key_only.table.copy_(torch.from_numpy(_filled(self.key)))
        return key_only

    def _lag_weight(self) -> Tensor:
        """(H, 2 L - 1) share of attention by lag under the fitted prior, with a little of every admissible lag."""
        lag, key = (torch.from_numpy(np.exp(_filled(part))) for part in (self.lag, self.key))
        seen = torch.from_numpy(~np.isnan(self.lag[0])).double()
        ones = torch.ones(key.shape[1], dtype=torch.float64)
        model = LagKeyModel(lag * seen, key)
        mass = model.lag * model.lag_rates(RowGroup(ones, ones))
        return mass / mass.sum(-1, keepdim=True) + 1e-6 * seen

    def to_dict(self) -> dict[str, NDArray[np.generic]]:
        """Arrays by name."""
        names = ("lags", "lag", "key", "explained", "interval", "explained_in_sample", "divergence_to_uniform")
        return {name: np.asarray(getattr(self, name)) for name in (*names, "deviation", "reasons")}


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
    with those predictions fixed. For grids see :func:`eotattn.diagnostics.fit_grid_prior`.

    Args:
        statistics: Of one layer; every sequence whole, from its first token (cached decoding is whole).
        is_causal: Whether only keys up to the query are admissible. The statistics say so; given, it is checked.
        window: Keys this many or more tokens before the query are inadmissible; likewise. What a mask does is no part
            of the prior.
        num_folds: Folds of the cross-validation, at least 2; no more than sequences are used.
        num_bootstraps: Resamples for the interval.
        smoothing: Share of the uniform prior mixed into the targets, so that unseen lags stay finite; in (0, 1).
        tolerance: Relative deviation of the margins to stop at.
        seed: Of folds and bootstrap.

    Returns:
        :class:`ImplicitPriorReport`; ``deviation`` above ``tolerance`` says that a fit has not converged.

    Raises:
        ValueError: If no query is there, rows do not sum to one because of an explicit sink, or the statistics are of
            another pattern.

    Source:
        Original.

    Example:
        >>> from eotattn.attention.statistics import row_statistics
        >>> query, key = torch.randn(2, 8, 3, 16, 4, generator=torch.Generator().manual_seed(0))
        >>> report = fit_prior(SequenceStatistics.of(row_statistics(query, key, is_causal=True)))
        >>> report.prior().dense(torch.arange(3), torch.arange(3)).shape
        torch.Size([3, 3, 3])
    """
    options = FitOptions(num_folds, num_bootstraps, smoothing, tolerance, seed)
    _check(statistics)
    problem = MarginProblem.of(statistics, is_causal, window, smoothing)
    model, numbers = fit_problem(problem, options)
    lag, key = _gauged(model, problem.lag_seen, problem.present.any(0))
    return ImplicitPriorReport(**numbers, lag=lag.numpy(), key=key.numpy(), is_causal=problem.is_causal)


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


def _check(statistics: SequenceStatistics) -> None:
    remedy = "Capture a model, or pass SequenceStatistics.of(...)"
    known = isinstance(statistics, SequenceStatistics)
    require(known, "fit_prior", "statistics", "be SequenceStatistics", statistics, remedy, error=TypeError)
    queries = statistics.num_queries
    full = bool((queries >= 1).all())
    require(full, OWNER, "statistics", "have a query in every sequence", queries.tolist(), "Drop the empty ones")
    sink = float(statistics.sums["explicit_sink_mass"].sum())
    require(sink == 0, OWNER, "statistics", "have no explicit sink", sink, "Rows must sum to one")
    keys = (statistics.column_count > 0).sum(-1).amax(-1)
    square = bool((keys <= queries).all())
    rule = "come from square attention, as many queries as keys"
    require(square, OWNER, "statistics", rule, (queries.tolist(), keys.tolist()), "Pass whole sequences")
    total = statistics.lag_mass.sum(-1) / queries[:, None]
    whole = bool(((total - 1).abs() < 1e-2).all())
    require(whole, OWNER, "statistics", "have rows that sum to one", float(total.min()), "Pass whole rows")
