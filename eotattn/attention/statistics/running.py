"""Statistics of many sequences: they accumulate over prompts, continue over decoding steps and add up over shards.

Legend: B batch, N sequences, H heads, Q queries, K keys, C chosen keys, M largest lag.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention.statistics.streaming import AttentionStatistics
from eotattn.checks import require

__all__ = ["ROW_SUMS", "SequenceStatistics"]

#: Row quantities that are summed over the queries of a sequence: name -> (statistics -> (B, H, Q)).
ROW_SUMS: dict[str, Callable[[AttentionStatistics], Tensor]] = {
    "entropy": lambda rows: rows.entropy,
    "normalised_entropy": lambda rows: rows.entropy / rows.num_outcomes.clamp(min=2).log(),
    "participation": lambda rows: rows.participation,
    "score_range": lambda rows: rows.score_range,
    "explicit_sink_mass": lambda rows: rows.explicit_sink_mass,
    "prior_divergence": lambda rows: _relative_to_prior(rows)[0],
    "prior_log_ratio": lambda rows: _relative_to_prior(rows)[1],
    "sensitivity": lambda rows: rows.context_sensitivity,
    "sensitivity_bound": lambda rows: rows.context_sensitivity_bound,
}

#: Row quantities that only some rows have: those with the chosen key and a competitor.
MARGIN_SUMS: dict[str, Callable[[AttentionStatistics], Tensor]] = {
    "margin": lambda rows: rows.margin,
    "content_margin": lambda rows: rows.content_margin,
    "prior_margin": lambda rows: rows.prior_margin,
    "is_sink": lambda rows: (rows.margin > 0).to(rows.margin.dtype),
}


def _relative_to_prior(rows: AttentionStatistics) -> tuple[Tensor, Tensor]:
    """KL(p || prior) and max_j |ln p_ij / prior_ij| of the keys, both in nats and at most omega."""
    lse = torch.where(rows.num_keys > 0, rows.key_log_sum_exp, 0.0)
    share = torch.where(rows.num_keys > 0, torch.exp(lse - rows.log_sum_exp), 1.0)  # what the keys hold together
    offset = lse - rows.prior_log_sum_exp
    mean_score = rows.expected_score / share.clamp(min=torch.finfo(share.dtype).tiny)
    ratio = torch.maximum((rows.score_max - offset).abs(), (offset - rows.score_min).abs())
    return (mean_score - offset).clamp(min=0), ratio


@dataclass(frozen=True, eq=False)
class SequenceStatistics:
    """Sums over the queries of each of N sequences, on the CPU in float64.

    Attributes:
        num_queries: (N,) queries that count.
        sums: Name -> (N, H) sum over those queries of a quantity of :data:`ROW_SUMS`.
        num_margins: (N, H) queries that have the first chosen key and a competitor.
        margin_sums: Name -> (N, H) sum over those of ``margin``, ``content_margin``, ``prior_margin`` (nats) and
            ``is_sink`` (1 where the margin is positive).
        key_mass: (N, H, C) sum of the weight on each chosen key.
        column_mass: (N, H, K) sum of weights by key, from the start of the sequence.
        column_count: (N, H, K) queries that admit the key.
        lag_mass: (N, H, 2 M + 1) sum of weights by lag, from -M to M tokens.
    """

    num_queries: Tensor
    sums: dict[str, Tensor]
    num_margins: Tensor
    margin_sums: dict[str, Tensor]
    key_mass: Tensor
    column_mass: Tensor
    column_count: Tensor
    lag_mass: Tensor

    @classmethod
    def of(cls, rows: AttentionStatistics) -> SequenceStatistics:
        """Sum the statistics of one attention call over its queries; its batch becomes N sequences."""
        counted = rows.counted[:, None, :]
        defined = counted & ~rows.margin.isnan()

        def total(values: Tensor, where: Tensor) -> Tensor:
            return torch.where(where, values.double(), 0.0).sum(2).cpu()

        last = rows.first_lag + rows.lag_mass.shape[-1] - 1
        reach = max(abs(rows.first_lag), abs(last))
        lags = functional.pad(rows.lag_mass, (rows.first_lag + reach, reach - last))
        return cls(
            num_queries=rows.counted.sum(-1).double().cpu(),
            sums={name: total(compute(rows), counted) for name, compute in ROW_SUMS.items()},
            num_margins=defined.double().sum(-1).cpu(),
            margin_sums={name: total(compute(rows), defined) for name, compute in MARGIN_SUMS.items()},
            key_mass=total(rows.key_mass, counted.unsqueeze(-1)),
            column_mass=rows.column_mass.double().cpu(),
            column_count=rows.column_count.double().cpu(),
            lag_mass=lags.double().cpu(),
        )

    @property
    def num_sequences(self) -> int:
        """N."""
        return self.num_queries.shape[0]

    @property
    def num_heads(self) -> int:
        """H."""
        return self.column_mass.shape[1]

    @property
    def max_lag(self) -> int:
        """M: lags run from -M to M."""
        return self.lag_mass.shape[-1] // 2

    def __add__(self, other: SequenceStatistics) -> SequenceStatistics:
        """Statistics of the sequences of both, in this order."""
        if not isinstance(other, SequenceStatistics):
            return NotImplemented
        return self._merged(other, lambda a, b: torch.cat([a, b]))

    def continued(self, later: SequenceStatistics) -> SequenceStatistics:
        """Add later queries of the *same* last sequences, as cached decoding yields them.

        Args:
            later: Statistics of B sequences, the B last ones here.
        """
        count = later.num_sequences
        enough = count <= self.num_sequences
        require(enough, "SequenceStatistics", "later", f"have at most {self.num_sequences} sequences", count, "Use +")

        def onto(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a[: a.shape[0] - count], a[a.shape[0] - count :] + b])

        return self._merged(later, onto)

    def heads(self, index: list[int]) -> SequenceStatistics:
        """Only the given heads."""

        def chosen(values: Tensor) -> Tensor:
            return values if values.dim() == 1 else values[:, index]

        return self._map(chosen)

    def sequences(self, chosen: Tensor) -> SequenceStatistics:
        """Only the sequences that an index or boolean mask (N,) chooses."""
        return self._map(lambda values: values[chosen])

    def _map(self, function: Callable[[Tensor], Tensor]) -> SequenceStatistics:
        mapped: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            is_group = isinstance(value, dict)
            mapped[field.name] = {k: function(v) for k, v in value.items()} if is_group else function(value)
        return SequenceStatistics(**mapped)

    def _merged(self, other: SequenceStatistics, join: Callable[[Tensor, Tensor], Tensor]) -> SequenceStatistics:
        ours, theirs = self.num_heads, other.num_heads
        rule = f"have {ours} heads"
        require(ours == theirs, "SequenceStatistics", "the other", rule, theirs, "Add statistics of one layer")
        same = self.key_mass.shape[-1] == other.key_mass.shape[-1]
        rule = f"have {self.key_mass.shape[-1]} chosen keys"
        require(same, "SequenceStatistics", "the other", rule, other.key_mass.shape[-1], "Choose the same keys")
        width = max(self.column_mass.shape[-1], other.column_mass.shape[-1])
        reach = max(self.max_lag, other.max_lag)
        a, b = self._padded(width, reach), other._padded(width, reach)
        merged: dict[str, Any] = {}
        for field in fields(self):
            left, right = getattr(a, field.name), getattr(b, field.name)
            if isinstance(left, dict):
                merged[field.name] = {name: join(left[name], right[name]) for name in left}
            else:
                merged[field.name] = join(left, right)
        return SequenceStatistics(**merged)

    def _padded(self, width: int, reach: int) -> SequenceStatistics:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("column_mass", "column_count"):
            values[name] = functional.pad(values[name], (0, width - values[name].shape[-1]))
        more = reach - self.max_lag
        values["lag_mass"] = functional.pad(self.lag_mass, (more, more))
        return SequenceStatistics(**values)
