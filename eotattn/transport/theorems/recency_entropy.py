"""Among causal lag distributions with a given mean lag the geometric one has the most entropy; it is ALiBi."""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_no_nan, check_positive, check_positive_int, require
from eotattn.transport.theorems.comparison import Comparison

__all__ = ["geometric_log_prior", "maximum_entropy_recency"]


def geometric_log_prior(mean_lag: float, num_lags: int) -> Tensor:
    """Return the log of the geometric distribution on lags 0, 1, 2, ...: linear in the lag.

    ``log q(t) = t log(mean / (1 + mean)) - log(1 + mean)``. Under a causal mask the lag is i - j, so up to a constant
    of each row this is a slope times the key position: one lane.

    Args:
        mean_lag: Tokens, positive.
        num_lags: How many lags to return.

    Returns:
        Nats, shape (num_lags,), float64.

    Example:
        >>> geometric_log_prior(1.0, 3).exp()
        tensor([0.5000, 0.2500, 0.1250], dtype=torch.float64)

    Source: Litman and Guo 2026, arXiv 2601.15380, Appendix F, Theorem 3.
    """
    mean = torch.tensor(check_positive("geometric_log_prior", "mean_lag", mean_lag), dtype=torch.float64)
    num_lags = check_positive_int("geometric_log_prior", "num_lags", num_lags)
    return torch.arange(num_lags, dtype=torch.float64) * -(1 / mean).log1p() - mean.log1p()


def maximum_entropy_recency(lag_distribution: Tensor) -> Comparison:
    """Compare the entropy of a lag distribution with that of the geometric one of the same mean.

    ``H(q) <= (1 + mu) log(1 + mu) - mu log mu`` with mu the mean lag; the slack is exactly ``KL(q || geometric)``.

    Args:
        lag_distribution: The q, shape (..., T), over lags 0 to T - 1; non-negative, rows sum to one, positive mean.

    Returns:
        Both entropies, nats, shape (...).

    Raises:
        TypeError: If it is not floating.
        ValueError: If it is no distribution, or all at lag zero.

    Example:
        >>> maximum_entropy_recency(torch.tensor([0.5, 0.5])).holds()
        True

    Source: Litman and Guo 2026, arXiv 2601.15380, Appendix F, Theorem 3.
    """
    owner, argument = "maximum_entropy_recency", "lag_distribution"
    check_floating(owner, argument, lag_distribution)
    check_no_nan(owner, argument, lag_distribution)
    require(bool((lag_distribution >= 0).all()), owner, argument, "be non-negative", lag_distribution, "Pass masses")
    error = float((lag_distribution.sum(-1) - 1).abs().max())
    close = error <= 64 * torch.finfo(lag_distribution.dtype).eps
    require(close, owner, argument, "sum to one", f"a sum {error:.1e} away from one", "Divide it by its sum")
    lags = torch.arange(lag_distribution.shape[-1], device=lag_distribution.device, dtype=lag_distribution.dtype)
    mean = (lag_distribution * lags).sum(-1)
    rule = "have a positive mean lag"
    require(bool((mean > 0).all()), owner, argument, rule, "all mass at lag zero", "Spread it")
    left = torch.special.entr(lag_distribution).sum(-1)
    right = mean.log1p() + mean * (1 / mean).log1p()  # the same, without a difference of large numbers
    return Comparison("H(q) <= (1 + mu) log(1 + mu) - mu log mu", left, right, "<=")
