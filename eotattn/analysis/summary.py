"""What an analysis found: per text while it runs, and put together.

Legend: A layers, H heads, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eotattn.analysis.shards import merged
from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.diagnostics import HeadReport, ImplicitPriorReport, ValueStatistics, fit_prior, head_report
from eotattn.diagnostics.quantities import CERTIFICATE, VALUE_QUANTITIES
from eotattn.integrations.residuals import Residuals

__all__ = ["Analysis", "TextFindings", "summarize"]


@dataclass(frozen=True, eq=False)
class TextFindings:
    """Of one text.

    Args:
        statistics: Layer -> sums over the rows of its attention.
        values: Layer -> what its values do, where that was seen.
        certificates: Layer -> (1, H) duality gaps, where that was computed.
        residuals: Norms after every block.
        numbers: Layer -> its number in the model; in the order of ``statistics`` where it is not known.
    """

    statistics: dict[str, SequenceStatistics]
    values: dict[str, ValueStatistics] = field(default_factory=dict)
    certificates: dict[str, Tensor] = field(default_factory=dict)
    residuals: Residuals = field(default_factory=Residuals)
    numbers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Analysis:
    """Everything that was found.

    Attributes:
        heads: The table of all heads.
        priors: Layer -> two-part prior of its heads, where one can be fitted.
        statistics: Layer -> sums by sequence.
        values: Layer -> what its values do, where that was seen.
        residuals: Norms of the residual stream after every block, one entry a text.
        tokens: Tokens of the first text, for labels.
        num_texts: Texts that were finished.
        num_given: Texts that were given; more where the run was interrupted.
        num_cut: Texts that were cut to the length asked for.
        needs: What is missing -> what it would need.
    """

    heads: HeadReport
    priors: dict[str, ImplicitPriorReport]
    statistics: dict[str, SequenceStatistics]
    values: dict[str, ValueStatistics]
    residuals: Residuals
    tokens: tuple[str, ...]
    num_texts: int
    num_given: int
    num_cut: int
    needs: dict[str, str]

    @property
    def is_complete(self) -> bool:
        """Whether every text was finished."""
        return self.num_texts == self.num_given

    def explained(self) -> NDArray[np.float64]:
        """(A, H) explained divergence: held out where there are several sequences, else in sample."""
        grid = np.full_like(self.heads.mean["entropy"], np.nan)
        for a, layer in enumerate(self.heads.layers):
            if layer in self.priors:
                report = self.priors[layer]
                values = report.explained_in_sample if np.isnan(report.explained).all() else report.explained
                grid[a, : len(values)] = values
        return grid

    def sink_kinds(self) -> list[list[str]]:
        """A lists of H words: what the sink of a head is in most of its sequences; "" where values were not seen."""
        mean = self.heads.mean
        if "dominant sink" not in mean:
            return [[""] * mean["entropy"].shape[1] for _ in self.heads.layers]
        shares = np.stack([mean[name] for name in ("no-operation", "broadcast", "dominant sink")], axis=-1)
        return [[_kind(*share) for share in row] for row in shares]

    def __str__(self) -> str:
        """The table of heads, averaged by layer."""
        return str(self.heads)


def _kind(no_operation: float, broadcast: float, sink: float) -> str:
    if np.isnan(no_operation):
        return ""
    for share, word in ((no_operation, "no-operation"), (broadcast, "broadcast")):
        if share > 0.5:
            return word
    return "other" if sink > 0.5 else "none"


def summarize(
    found: Sequence[TextFindings],
    *,
    tokens: tuple[str, ...] = (),
    num_given: int = 1,
    num_cut: int = 0,
    chosen_heads: Sequence[int] | None = None,
) -> Analysis:
    """Put the findings of all texts together; ``chosen_heads`` numbers the heads where not all were kept."""
    names = list(dict.fromkeys(name for part in found for name in part.statistics))
    statistics = {name: merged([part.statistics[name] for part in found]) for name in names}
    values = {n: merged([part.values[n] for part in found]) for n in names if all(n in part.values for part in found)}
    gaps = {n: [part.certificates[n] for part in found if n in part.certificates] for n in names}
    certificates = {name: torch.cat(parts) for name, parts in gaps.items() if parts}
    priors = {layer: fit_prior(stats) for layer, stats in statistics.items() if _has_prior(stats)}
    residuals = merged([part.residuals for part in found])
    heads = head_report(statistics, values=values, certificates=certificates)
    numbers = {name: number for part in found for name, number in part.numbers.items()}
    heads = replace(heads, numbers=tuple(numbers.get(name, a) for a, name in enumerate(names)))
    heads = heads if chosen_heads is None else replace(heads, heads=tuple(chosen_heads))
    return Analysis(
        heads=heads,
        priors=priors,
        statistics=statistics,
        values=values,
        residuals=residuals,
        tokens=tokens,
        num_texts=len(found),
        num_given=num_given,
        num_cut=num_cut,
        needs=_needs(heads, priors, residuals, len(found)),
    )


def _has_prior(stats: SequenceStatistics) -> bool:
    """Whether rows sum to one and attention is square, more than one token long."""
    keys = int((stats.column_count > 0).sum(-1).max())
    plain = float(stats.sums["explicit_sink_mass"].sum()) == 0
    return plain and 1 < keys <= int(stats.num_queries.max())


def _needs(
    heads: HeadReport, priors: dict[str, ImplicitPriorReport], residuals: Residuals, count: int
) -> dict[str, str]:
    """What could not be computed, and what it takes."""
    missing: dict[str, str] = {}
    for group in (VALUE_QUANTITIES, (CERTIFICATE,)):
        for quantity in group:
            grid = heads.mean.get(quantity.name)
            where = [name for a, name in enumerate(heads.layers) if grid is None or np.isnan(grid[a]).all()]
            if where:
                places = "all layers" if len(where) == len(heads.layers) else ", ".join(where)
                missing[quantity.name] = f"needs {quantity.needs}; {places} did not show that"
    without = [name for name in heads.layers if name not in priors]
    if without:
        missing["implicit prior"] = f"needs square attention without explicit sinks; not so in {', '.join(without)}"
    if not residuals.blocks:
        missing["residual norms"] = "needs a running model with its blocks in an nn.ModuleList"
    if count < 2:
        missing["intervals"] = "needs two texts or more"
    return missing
