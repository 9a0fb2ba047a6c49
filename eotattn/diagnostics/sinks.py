"""Sinks: how much weight a key holds, and how that depends on the strength of the content signal.

Legend: B batch, H heads, Q queries, K keys, N observations, M bins.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eotattn.checks import check_floating, check_no_nan, check_positive_int, require
from eotattn.provenance import Table

__all__ = ["SinkMassReport", "score_range", "sink_mass", "sink_mass_by_score_range"]


def score_range(scores: Tensor, admissible: Tensor | None = None) -> Tensor:
    """Compute omega_i = max_j scores_ij - min_j scores_ij over the admissible keys: the strength of the signal.

    A query's weights stay within the factor exp(+-omega_i) of its prior, so omega = 0 means that the head returns it.

    Args:
        scores: (..., Q, K) content scores, already multiplied by the scale and *without* log-prior, nats.
        admissible: Boolean, broadcastable to ``scores``, true where a key may be attended; all keys by default.

    Returns:
        (..., Q) omega, nats, at least zero; zero for a query with fewer than two admissible keys.

    Raises:
        ValueError: If an admissible score is not finite, or the mask does not broadcast.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), theorem 5.1.

    Example:
        >>> score_range(torch.tensor([[1.0, 4.0], [0.5, 0.0]]), torch.ones(2, 2, dtype=torch.bool).tril())
        tensor([0.0000, 0.5000])
    """
    check_floating("score_range", "scores", scores)
    require(scores.dim() >= 2, "score_range", "scores", "have shape (..., Q, K)", scores, "Add a query axis")
    seen = _admissible("score_range", scores, admissible)
    check_no_nan("score_range", "scores at admissible keys", scores.masked_fill(~seen, 0.0))
    low = scores.masked_fill(~seen, float("inf")).amin(-1)
    high = scores.masked_fill(~seen, float("-inf")).amax(-1)
    return torch.where(seen.any(-1), high - low, torch.zeros_like(high))


def sink_mass(attention_weights: Tensor, key: int = 0) -> Tensor:
    """Compute the mass of one key, p_ij*: what a query gives to the sink.

    Args:
        attention_weights: (..., Q, K), rows sum to one, or to zero where no key is admissible.
        key: Index j* of the sink, from -K to K - 1; the first token by default.

    Returns:
        (..., Q), dimensionless, in [0, 1].

    Raises:
        ValueError: If the weights are no weights, or the key does not exist.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), figure 2c and definition 5.2.

    Example:
        >>> sink_mass(torch.tensor([[1.0, 0.0], [0.75, 0.25]]))
        tensor([1.0000, 0.7500])
    """
    check_floating("sink_mass", "attention_weights", attention_weights)
    has_rows = attention_weights.dim() >= 2
    remedy = "Pass softmax weights of shape (..., Q, K)"
    require(has_rows, "sink_mass", "attention_weights", "have shape (..., Q, K)", attention_weights, remedy)
    check_no_nan("sink_mass", "attention_weights", attention_weights)
    low, high = float(attention_weights.min()), float(attention_weights.max())
    require(low >= 0 and high <= 1 + 1e-3, "sink_mass", "attention_weights", "lie in [0, 1]", (low, high), remedy)
    num_keys = attention_weights.shape[-1]
    rule = f"be an integer from {-num_keys} to {num_keys - 1}"
    exists = isinstance(key, int) and not isinstance(key, bool) and -num_keys <= key < num_keys
    require(exists, "sink_mass", "key", rule, key, "Name a key that the weights have")
    return attention_weights[..., key]


@dataclass(frozen=True, eq=False)
class SinkMassReport(Table):
    """Sink mass in bins of signal strength; bins without observations have NaN means.

    Attributes:
        bin_edges: (M + 1,) edges of omega, nats, increasing.
        counts: (M,) observations a bin.
        mean_score_range: (M,) mean omega in the bin, nats.
        mean_sink_mass: (M,) mean mass on the sink, in [0, 1].
        standard_error: (M,) standard error of that mean as if observations were independent; NaN below two.
    """

    bin_edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    mean_score_range: NDArray[np.float64]
    mean_sink_mass: NDArray[np.float64]
    standard_error: NDArray[np.float64]

    def to_dict(self) -> dict[str, NDArray[np.generic]]:
        """Arrays by name."""
        return asdict(self)

    def columns(self) -> dict[str, NDArray[np.generic]]:
        """One row a bin."""
        named = {name: values for name, values in asdict(self).items() if name != "bin_edges"}
        return {"from": self.bin_edges[:-1], "to": self.bin_edges[1:], **named}

    def __str__(self) -> str:
        """One line a bin."""
        lines = ["omega (nats)       count   mean omega   sink mass   standard error"]
        for m in range(len(self.counts)):
            span = f"{self.bin_edges[m]:6.2f} to {self.bin_edges[m + 1]:6.2f}"
            numbers = (
                f"{self.mean_score_range[m]:10.3f}  {self.mean_sink_mass[m]:10.4f}  {self.standard_error[m]:15.4f}"
            )
            lines.append(f"{span} {self.counts[m]:7d}   {numbers}")
        return "\n".join(lines)


def sink_mass_by_score_range(score_range: Tensor, sink_mass: Tensor, *, num_bins: int = 12) -> SinkMassReport:
    """Average the sink mass over bins of omega that hold equally many observations.

    Args:
        score_range: (...) omega of every observation, nats; see :func:`score_range`. Average over heads first to follow
            the paper.
        sink_mass: The same shape; see :func:`sink_mass`.
        num_bins: Number of bins M; quantiles of omega are their edges. Ties merge bins.

    Returns:
        A :class:`SinkMassReport`; counts sum to the number of observations N.

    Raises:
        ValueError: If shapes differ, values are not finite, omega is negative, or N is below ``num_bins``.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), figure 2c; quantile bins are ours.

    Example:
        >>> report = sink_mass_by_score_range(torch.arange(4.0), torch.tensor([0.9, 0.7, 0.3, 0.1]), num_bins=2)
        >>> report.mean_sink_mass.round(3)
        array([0.8, 0.2])
    """
    owner = "sink_mass_by_score_range"
    for name, value in (("score_range", score_range), ("sink_mass", sink_mass)):
        check_floating(owner, name, value)
        check_no_nan(owner, name, value)
    same = score_range.shape == sink_mass.shape
    require(
        same, owner, "sink_mass", f"have the shape {tuple(score_range.shape)} of score_range", sink_mass, "Match them"
    )
    require(
        bool((score_range >= 0).all()),
        owner,
        "score_range",
        "be non-negative",
        float(score_range.min()),
        "See score_range",
    )
    check_positive_int(owner, "num_bins", num_bins)
    omega = score_range.detach().double().flatten().cpu().numpy()
    mass = sink_mass.detach().double().flatten().cpu().numpy()
    remedy = "Use fewer bins or more queries"
    require(omega.size >= num_bins, owner, "num_bins", f"be at most the {omega.size} observations", num_bins, remedy)
    edges = np.unique(np.quantile(omega, np.linspace(0, 1, num_bins + 1)))
    edges = edges if edges.size > 1 else np.array([edges[0], edges[0] + 1.0])
    return _binned(omega, mass, edges)


def _binned(omega: NDArray[np.float64], mass: NDArray[np.float64], edges: NDArray[np.float64]) -> SinkMassReport:
    """Means in the bins [edge_m, edge_m+1), the last one closed."""
    index = np.clip(np.searchsorted(edges, omega, side="right") - 1, 0, edges.size - 2)
    counts = np.bincount(index, minlength=edges.size - 1)

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.bincount(index, weights=values, minlength=edges.size - 1)
        return np.divide(total, counts, out=np.full(counts.size, np.nan), where=counts > 0)

    mean_mass = mean(mass)
    squares = np.bincount(index, weights=(mass - mean_mass[index]) ** 2, minlength=edges.size - 1)
    variance = np.divide(squares, counts * (counts - 1.0), out=np.full(counts.size, np.nan), where=counts > 1)
    return SinkMassReport(edges, counts, mean(omega), mean_mass, np.sqrt(variance))


def _admissible(owner: str, scores: Tensor, admissible: Tensor | None) -> Tensor:
    """The mask at the shape of the scores."""
    if admissible is None:
        return torch.ones_like(scores, dtype=torch.bool)
    is_boolean = isinstance(admissible, Tensor) and admissible.dtype == torch.bool
    remedy = "Pass true where a key may be attended"
    require(is_boolean, owner, "admissible", "be a boolean tensor", admissible, remedy, error=TypeError)
    padded = (1,) * (scores.dim() - admissible.dim()) + tuple(admissible.shape)
    fits = admissible.dim() <= scores.dim() and all(
        have in (1, want) for have, want in zip(padded, scores.shape, strict=True)
    )
    require(fits, owner, "admissible", f"broadcast to {tuple(scores.shape)}", admissible, remedy)
    return admissible.expand(scores.shape)
