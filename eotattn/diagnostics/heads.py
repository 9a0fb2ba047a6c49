"""One table for all heads of a model, with intervals over sequences.

Legend: A layers, N sequences, H heads, L positions, M largest lag, B bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.checks import check_positive, check_positive_int, require
from eotattn.diagnostics.bootstrap import mean_interval, resamples
from eotattn.diagnostics.quantities import (
    CERTIFICATE,
    QUANTITIES,
    TOKEN_QUANTITIES,
    VALUE_QUANTITIES,
    Quantity,
    key_quantities,
    local_mass_quantity,
)
from eotattn.diagnostics.token_statistics import TokenStatistics
from eotattn.diagnostics.value_statistics import ValueStatistics
from eotattn.provenance import Table

__all__ = ["HeadReport", "head_report"]

Array = NDArray[np.float64]
#: Groups of quantities, each with what was collected for it, by layer.
Sources = list[tuple[tuple[Quantity, ...], Mapping[str, Any]]]


@dataclass(frozen=True, eq=False)
class HeadReport(Table):
    """Means over sequences of every quantity, by layer and head; NaN where a layer has no such head.

    Attributes:
        layers: A names.
        quantities: What was computed, in order.
        mean: Name -> (A, H).
        low: Name -> (A, H) 2.5% quantile over a bootstrap of the sequences; NaN below two sequences.
        high: Name -> (A, H) 97.5% quantile.
        layer_interval: Name -> (A, 2) 2.5% and 97.5% quantile of the mean over heads, over the same bootstrap.
        sink_rate: Threshold -> (A,) share of heads and sequences whose sink mass of the first chosen key exceeds it,
            among those that have the key; NaN where none has.
        sink_rate_interval: Threshold -> (A, 2) its quantiles over a bootstrap of the sequences.
        lag_profile: A arrays (H, 2 M + 1): weight by lag, from -M to M; sums to one less the explicit sink's.
        num_sequences: N.
        by_sequence: Name -> A arrays (N, H): what the means are taken over.
        heads: H numbers that the heads have in the model.
        numbers: A numbers that the layers have in the model.
    """

    layers: tuple[str, ...]
    quantities: tuple[Quantity, ...]
    mean: dict[str, Array]
    low: dict[str, Array]
    high: dict[str, Array]
    layer_interval: dict[str, Array]
    sink_rate: dict[float, Array]
    sink_rate_interval: dict[float, Array]
    lag_profile: tuple[Array, ...]
    num_sequences: int
    by_sequence: dict[str, tuple[Array, ...]]
    heads: tuple[int, ...]
    numbers: tuple[int, ...]

    def to_dict(self) -> dict[str, NDArray[np.generic]]:
        """Columns of a tidy table: one row a layer and head, three columns a quantity."""
        layer, head = np.indices(next(iter(self.mean.values())).shape)
        kept = ~np.isnan(self.mean["entropy"]).ravel()
        columns: dict[str, NDArray[np.generic]] = {
            "layer": np.array(self.layers)[layer.ravel()][kept],
            "head": np.array(self.heads)[head.ravel()][kept],
        }
        for name in self.mean:
            for suffix, values in (("", self.mean), (" low", self.low), (" high", self.high)):
                columns[name + suffix] = values[name].ravel()[kept]
        return columns

    def __str__(self) -> str:
        """Means over heads, one line a layer."""
        chosen = [name for name in self.mean if name.startswith("sink mass")][:1]
        chosen += ["normalised entropy", "omega", "margin", "content margin", "prior margin", "context sensitivity"]
        width = max(len(name) for name in self.layers)
        lines = ["  ".join([f"{'layer':<{width}}", *(f"{name:>19}" for name in chosen)])]
        for a, layer in enumerate(self.layers):
            values = [self.mean[name][a] for name in chosen]
            means = [float(row[~np.isnan(row)].mean()) if (~np.isnan(row)).any() else float("nan") for row in values]
            lines.append("  ".join([f"{layer:<{width}}", *(f"{value:19.3f}" for value in means)]))
        return "\n".join(lines)


def head_report(  # noqa: PLR0913  (one argument a source or an option of the table)
    layers: Mapping[str, SequenceStatistics],
    *,
    values: Mapping[str, ValueStatistics] | None = None,
    certificates: Mapping[str, Tensor] | None = None,
    token_scores: Mapping[str, TokenStatistics] | None = None,
    sink_positions: Sequence[int] = (0,),
    thresholds: Sequence[float] = (0.3,),
    local_width: int = 4,
    num_bootstraps: int = 500,
    seed: int = 0,
) -> HeadReport:
    """Compute every quantity of :mod:`eotattn.diagnostics.quantities` for every head, with intervals over sequences.

    Args:
        layers: Name -> statistics, from a capture or from maps; they may differ in heads and sequences.
        values: Name -> what values do, from a capture; layers may be missing.
        certificates: Name -> (N, H) gaps, from a capture that certifies; layers may be missing.
        token_scores: Name -> weights on keys whose token repeats, from a capture; layers may be missing.
        sink_positions: Keys whose sink mass is reported, counted from the first token; the first one has the sink rate.
            For sinks wherever they are see :func:`eotattn.diagnostics.strongest_keys`.
        thresholds: Sink masses above which a head counts as having a sink, in (0, 1).
        local_width: Reach of the local mass, tokens.
        num_bootstraps: Resamples B of the sequences.
        seed: Of the bootstrap.

    Returns:
        :class:`HeadReport`.

    Raises:
        ValueError: If there is no layer or sequence.

    Source:
        Sink rate: Gu et al. 2024 (arXiv 2410.10781), threshold 0.3. Others: see the quantities.

    Example:
        >>> from eotattn.attention.statistics import weight_statistics
        >>> stats = SequenceStatistics.of(weight_statistics(torch.full((2, 3, 4, 4), 0.25)))
        >>> head_report({"first": stats}).mean["sink mass of key 0"]
        array([[0.25, 0.25, 0.25]])
    """
    _check(layers, sink_positions, thresholds, local_width)
    of_rows = (*key_quantities(tuple(sink_positions)), *QUANTITIES, local_mass_quantity(local_width))
    sources: Sources = [
        (of_rows, {name: stats.sequences(stats.num_queries > 0) for name, stats in layers.items()}),
        (TOKEN_QUANTITIES if token_scores else (), token_scores or {}),
        (VALUE_QUANTITIES if values else (), values or {}),
        ((CERTIFICATE,) if certificates else (), certificates or {}),
    ]
    for rows in sources[0][1].values():
        require(rows.num_sequences > 0, "head_report", "layers", "have queries", list(layers), "Run the model first")
    heads = max(stats.num_heads for stats in layers.values())
    tables, whole, each = _tables(sources, list(layers), heads, num_bootstraps, seed)
    sinks = [of_rows[0].compute(rows) for rows in sources[0][1].values()]
    rates = {
        check_positive("head_report", "thresholds", t): _sink_rates(sinks, t, num_bootstraps, seed) for t in thresholds
    }
    return HeadReport(
        layers=tuple(layers),
        quantities=tuple(quantity for group, _ in sources for quantity in group),
        **tables,
        layer_interval=whole,
        sink_rate={threshold: found[:, 0] for threshold, found in rates.items()},
        sink_rate_interval={threshold: found[:, 1:] for threshold, found in rates.items()},
        lag_profile=tuple(_lag_profile(stats) for stats in layers.values()),
        num_sequences=max(stats.num_sequences for stats in layers.values()),
        by_sequence={name: tuple(found) for name, found in each.items()},
        heads=tuple(range(heads)),
        numbers=tuple(range(len(layers))),
    )


def _tables(
    sources: Sources, layers: list[str], heads: int, num_bootstraps: int, seed: int
) -> tuple[dict[str, dict[str, Array]], dict[str, Array], dict[str, list[Array]]]:
    """Mean, low and high of every quantity (A, H), the interval of its mean over heads (A, 2), and A times (N, H)."""
    generator = torch.Generator().manual_seed(seed)
    names = [quantity.name for group, _ in sources for quantity in group]
    tables = {part: {name: np.full((len(layers), heads), np.nan) for name in names} for part in ("mean", "low", "high")}
    whole = {name: np.full((len(layers), 2), np.nan) for name in names}
    each = {name: [np.full((0, heads), np.nan)] * len(layers) for name in names}
    for a, layer in enumerate(layers):
        for group, collected in sources:
            for quantity, found, drawn in _computed(group, collected.get(layer), num_bootstraps, generator):
                for table, numbers in zip(tables.values(), mean_interval(found, drawn), strict=True):
                    table[quantity.name][a, : len(numbers)] = numbers
                whole[quantity.name][a] = _mean_over_heads(found, drawn)[1:]
                each[quantity.name][a] = found.numpy()
    return tables, whole, each


def _computed(
    quantities: tuple[Quantity, ...], collected: Any, num_bootstraps: int, generator: torch.Generator
) -> Iterator[tuple[Quantity, Tensor, Tensor]]:
    """Every quantity of one layer with its values (N, H) and resamples (B, N); nothing where nothing was collected."""
    if collected is None or not quantities:
        return
    count = quantities[0].compute(collected).shape[0]
    drawn = resamples(count, num_bootstraps, generator)
    for quantity in quantities:
        yield quantity, quantity.compute(collected), drawn


def _sink_rates(sinks: Sequence[Tensor], threshold: float, num_bootstraps: int, seed: int) -> Array:
    """(A, 3) share of sink masses (N, H) above the threshold, and its interval; NaN where no sequence has the key."""
    generator, found = torch.Generator().manual_seed(seed), []
    for sink in sinks:
        drawn = resamples(len(sink), num_bootstraps, generator)
        above = torch.where(sink.isnan(), torch.nan, (sink > threshold).double())
        found.append(_mean_over_heads(above, drawn))
    return np.array(found)


def _mean_over_heads(values: Tensor, drawn: Tensor) -> tuple[float, float, float]:
    """Mean over heads and sequences (N, H), and the ends of its interval."""
    mean, low, high = mean_interval(values.nanmean(1, keepdim=True), drawn)
    return float(mean[0]), float(low[0]), float(high[0])


def _check(
    layers: Mapping[str, SequenceStatistics], keys: Sequence[int], thresholds: Sequence[float], local_width: int
) -> None:
    is_table, remedy = isinstance(layers, Mapping), "Pass the layers of a capture, or of map_statistics"
    require(is_table, "head_report", "layers", "map names to statistics", layers, remedy, error=TypeError)
    require(len(layers) > 0, "head_report", "layers", "hold at least one layer", dict(layers), "Run the model first")
    require(len(keys) > 0, "head_report", "sink_positions", "name at least one key", keys, "Pass (0,)")
    for key in keys:
        check_positive_int("head_report", "sink_positions", key, minimum=0)
    for threshold in thresholds:
        require(0 < threshold < 1, "head_report", "thresholds", "lie in (0, 1)", threshold, "Pass shares of a row")
    check_positive_int("head_report", "local_width", local_width, minimum=0)


def _lag_profile(stats: SequenceStatistics) -> Array:
    return (stats.lag_mass.sum(0) / stats.num_queries.sum().clamp(min=1)).numpy()
