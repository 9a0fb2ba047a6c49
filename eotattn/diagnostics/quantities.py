"""What is reported of every head: each quantity with its formula, unit, source, and how it follows from streamed sums.

Legend: N sequences, H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.diagnostics.strongest_keys import key_share, strongest_positions

__all__ = [
    "CERTIFICATE",
    "QUANTITIES",
    "TOKEN_QUANTITIES",
    "VALUE_QUANTITIES",
    "Quantity",
    "key_quantities",
    "local_mass_quantity",
]

PAPER = "Litman and Guo 2026 (arXiv 2601.15380)"
INDUCTION = "Olsson et al. 2022 (arXiv 2209.11895)"
DRAINS = "Gu et al. 2024 (arXiv 2410.10781)"
HEADS = "Guo et al. 2024 (arXiv 2410.13835)"


@dataclass(frozen=True)
class Quantity:
    """One number a head and sequence.

    Args:
        name: Its name in reports and tables.
        unit: nats, tokens or 1.
        formula: What is computed, averaged over the queries of a sequence.
        source: Where it is defined.
        compute: What was collected of a layer (sums over its rows, or over its values) -> (N, H); NaN where it does not
            exist.
        needs: What a model must show for it.
    """

    name: str
    unit: str
    formula: str
    source: str
    compute: Callable[[Any], Tensor]
    needs: str = "attention rows"


def _mean(name: str) -> Callable[[SequenceStatistics], Tensor]:
    return lambda stats: stats.sums[name] / stats.num_queries[:, None]


def _margin(name: str) -> Callable[[SequenceStatistics], Tensor]:
    return lambda stats: stats.margin_sums[name] / stats.num_margins  # 0 / 0 is NaN: no row has a margin


def _share(stats: SequenceStatistics) -> Tensor:
    """(N, H, K) share of all weight that each key receives."""
    return stats.column_mass / stats.num_queries[:, None, None]


def _concentration(stats: SequenceStatistics) -> Tensor:
    return _share(stats).square().sum(-1)


def _doubly_stochastic(stats: SequenceStatistics) -> Tensor:
    exists = (stats.column_count > 0).to(stats.column_mass.dtype)
    even = exists / exists.sum(-1, keepdim=True)
    return (_share(stats) - even).abs().sum(-1) / 2


def _previous(stats: SequenceStatistics) -> Tensor:
    """Over the queries of whole sequences that have a previous token; 0 / 0 is NaN."""
    lag = min(stats.max_lag, 1)
    return stats.lag_mass[..., stats.max_lag + lag] * lag / (stats.num_queries - 1).clamp(min=0)[:, None]


def _strongest(stats: SequenceStatistics) -> Tensor:
    return key_share(stats).gather(-1, strongest_positions(stats).unsqueeze(-1)).squeeze(-1)


#: Every quantity that needs no parameter.
QUANTITIES: tuple[Quantity, ...] = (
    Quantity("entropy", "nats", "-sum_j p_ij ln p_ij", "Shannon 1948", _mean("entropy")),
    Quantity(
        "normalised entropy",
        "1",
        "entropy / ln(admissible keys, and one for an explicit sink)",
        "original",
        _mean("normalised_entropy"),
    ),
    Quantity("inverse participation ratio", "1", "sum_j p_ij^2", "standard", _mean("participation")),
    Quantity("column concentration", "1", "sum_j (mean_i p_ij)^2", "original", _concentration),
    Quantity(
        "doubly stochastic distance",
        "1",
        "sum_j |mean_i p_ij - 1 / K| / 2",
        "original; Sander et al. 2022 (arXiv 2110.11773)",
        _doubly_stochastic,
    ),
    Quantity("omega", "nats", "max_j s_ij - min_j s_ij", f"{PAPER}, theorem 5.1", _mean("score_range")),
    Quantity("distance to prior", "nats", "KL(p_i || prior_i), at most omega", PAPER, _mean("prior_divergence")),
    Quantity(
        "log ratio to prior",
        "nats",
        "max_j |ln p_ij - ln prior_ij|, at most omega (collapse bound)",
        f"{PAPER}, theorem 5.1",
        _mean("prior_log_ratio"),
    ),
    Quantity("margin", "nats", "z_ij* - max_k z_ik, k not j*", f"{PAPER}, definition 5.2", _margin("margin")),
    Quantity("content margin", "nats", "its content part", f"{PAPER}, definition 5.2", _margin("content_margin")),
    Quantity("prior margin", "nats", "its prior part", f"{PAPER}, definition 5.2", _margin("prior_margin")),
    Quantity("queries with the sink first", "1", "share of margins above zero", PAPER, _margin("is_sink")),
    Quantity(
        "context sensitivity", "1", "Psi = sum_k p_ik, k not j*", f"{PAPER}, definition 5.3", _mean("sensitivity")
    ),
    Quantity(
        "sensitivity bound",
        "1",
        "(n - 1) / (exp(margin) + n - 1), at least Psi",
        f"{PAPER}, theorem 5.4",
        _mean("sensitivity_bound"),
    ),
    Quantity("previous-token score", "1", "mean of p_ik, k = i - 1", INDUCTION, _previous),
    Quantity(
        "mass of the strongest key",
        "1",
        "mean of p_ik over queries that admit k, the key with the most weight in total",
        "Gu et al. 2024 (arXiv 2410.10781), there of the first tokens",
        _strongest,
    ),
    Quantity(
        "explicit sink mass", "1", "exp(b - lse_i) of a learned logit b", "gpt-oss 2025", _mean("explicit_sink_mass")
    ),
)

_REPEATS = "token ids of whole sequences in which a token repeats"

#: Every quantity of :class:`eotattn.diagnostics.TokenStatistics`.
TOKEN_QUANTITIES: tuple[Quantity, ...] = (
    Quantity(
        "induction score",
        "1",
        "sum of p_ij over keys j that follow an earlier key of token i, mean over queries that have one",
        INDUCTION,
        lambda scores: scores.induction,
        _REPEATS,
    ),
    Quantity(
        "duplicate-token score",
        "1",
        "sum of p_ij over earlier keys j of token i, mean over queries that have one",
        "Wang et al. 2022 (arXiv 2211.00593)",
        lambda scores: scores.duplicate,
        _REPEATS,
    ),
)

_VALUES = "values, and a linear layer that reads the attention's output"

#: Every quantity of :class:`eotattn.diagnostics.ValueStatistics`.
VALUE_QUANTITIES: tuple[Quantity, ...] = (
    Quantity("value drain", "residual units", "mean_j ||W_O v_j||", DRAINS, lambda v: v.drain, _VALUES),
    Quantity("value drain of the sink", "residual units", "||W_O v_j*||", DRAINS, lambda v: v.sink_drain, _VALUES),
    Quantity("relative drain of the sink", "1", "||W_O v_j*|| / mean", DRAINS, lambda v: v.relative_drain, _VALUES),
    Quantity("contribution", "residual units", "mean_i ||W_O o_i||", HEADS, lambda v: v.contribution, _VALUES),
    Quantity(
        "stable rank", "1", "||O||_F^2 / ||O||_2^2 of the output rows", "standard", lambda v: v.stable_rank, _VALUES
    ),
    Quantity(
        "dominant sink",
        "share of sequences",
        "90% of queries give j* at least half their weight",
        f"{HEADS}; thresholds are conventions",
        lambda v: v.is_sink.double(),
        _VALUES,
    ),
    Quantity(
        "no-operation",
        "share of sequences",
        "a dominant sink whose relative drain is at most 0.2",
        f"{HEADS}; thresholds are conventions",
        lambda v: v.is_no_operation.double(),
        _VALUES,
    ),
    Quantity(
        "broadcast",
        "share of sequences",
        "a dominant sink whose relative drain is at least 0.5, with stable rank at most 1.5",
        f"{HEADS}; thresholds are conventions",
        lambda v: v.is_broadcast.double(),
        _VALUES,
    ),
    Quantity(
        "dormant",
        "share of sequences",
        "contribution below a tenth of the layer's mean",
        f"{HEADS}; the threshold is a convention",
        lambda v: v.is_dormant.double(),
        _VALUES,
    ),
)

#: The duality gap of weights that a model computed, given as (N, H).
CERTIFICATE = Quantity(
    "certificate",
    "nats",
    "largest gap lse_i - sum_j p_ij z_ij + sum_j p_ij ln p_ij of the last rows, in the model's own weights",
    "Litman 2025 (arXiv 2508.08369)",
    lambda gaps: gaps,
    "a call that can be repeated, of at most 1024 keys",
)


def key_quantities(keys: tuple[int, ...]) -> tuple[Quantity, ...]:
    """The sink mass of every chosen key: a_k = mean of p_ik over the queries that admit key k (Gu et al. 2024)."""

    def of(key: int) -> Quantity:
        def compute(stats: SequenceStatistics) -> Tensor:
            if key >= stats.column_mass.shape[-1]:
                return stats.sums["entropy"] * torch.nan
            return key_share(stats)[..., key]

        formula = f"mean of p_ik over queries that admit k = {key}"
        return Quantity(f"sink mass of key {key}", "1", formula, "Gu et al. 2024 (arXiv 2410.10781)", compute)

    return tuple(of(key) for key in keys)


def local_mass_quantity(width: int) -> Quantity:
    """The weight within ``width`` tokens of the query."""

    def compute(stats: SequenceStatistics) -> Tensor:
        centre, reach = stats.max_lag, min(width, stats.max_lag)
        return stats.lag_mass[..., centre - reach : centre + reach + 1].sum(-1) / stats.num_queries[:, None]

    return Quantity(f"mass within {width} tokens", "1", f"sum of p_ij over |i - j| <= {width}", "original", compute)
