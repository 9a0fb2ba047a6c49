"""What an analysis found: per text while it runs, and put together.

Legend: A layers, H heads, N texts.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.diagnostics import (
    HeadReport,
    ImplicitPriorReport,
    StrongestKeys,
    TokenStatistics,
    TopKeys,
    ValueStatistics,
)
from eotattn.integrations.residuals import Residuals
from eotattn.provenance import library_versions

__all__ = ["Subject", "Summary", "TextFindings"]


@dataclass(frozen=True)
class Subject:
    """What was analysed.

    Args:
        model: Its class and name, or where maps come from.
        version: Of this package.
        date: Day of the analysis, year-month-day.
    """

    model: str
    version: str
    date: str

    @classmethod
    def today(cls, model: str) -> Subject:
        """Analysed now by the installed version."""
        return cls(model, library_versions()["eotattn"], datetime.date.today().isoformat())

    def __str__(self) -> str:
        """One line."""
        return f"{self.model}, {self.date}, eotattn {self.version}"


@dataclass(frozen=True, eq=False)
class TextFindings:
    """Of one text, or of a few that ran together.

    Args:
        statistics: Layer -> sums over the rows of its attention.
        values: Layer -> what its values do, where that was seen.
        certificates: Layer -> (1, H) duality gaps, where that was computed.
        residuals: Norms after every block.
        numbers: Layer -> its number in the model; in the order of ``statistics`` where it is not known.
        token_scores: Layer -> weights on keys whose token repeats, where ids were seen.
        top_keys: Layer -> strongest keys of the first queries, where that was kept.
        tokens: A text's tokens, for names, one entry a text; none where they are not known.
        loss: A text's mean over its tokens after the first, nats, one entry a text; none where the model does not
            predict the next token.
        count: Texts.
    """

    statistics: dict[str, SequenceStatistics]
    values: dict[str, ValueStatistics] = field(default_factory=dict)
    certificates: dict[str, Tensor] = field(default_factory=dict)
    residuals: Residuals = field(default_factory=Residuals)
    numbers: dict[str, int] = field(default_factory=dict)
    token_scores: dict[str, TokenStatistics] = field(default_factory=dict)
    top_keys: dict[str, TopKeys] = field(default_factory=dict)
    tokens: tuple[tuple[str, ...], ...] = ()
    loss: tuple[float, ...] = ()
    count: int = 1


@dataclass(frozen=True, eq=False)
class Summary:
    """Everything that was found, put together over the texts.

    Attributes:
        heads: The table of all heads.
        priors: Layer -> two-part prior of its heads, where one can be fitted.
        statistics: Layer -> sums by sequence.
        values: Layer -> what its values do, where that was seen.
        residuals: Norms of the residual stream after every block, one entry a text.
        strongest: The key that receives most weight, by layer, text and head.
        top_keys: Layer -> strongest keys of the first queries, of the first texts: a picture of single heads.
        tokens: Tokens of every text; none for maps.
        loss: (N,) mean nats a token of every text; NaN where the model does not predict the next token.
        subject: What was analysed, by which version, when.
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
    strongest: StrongestKeys
    top_keys: dict[str, TopKeys]
    tokens: tuple[tuple[str, ...], ...]
    loss: NDArray[np.float64]
    subject: Subject
    num_texts: int
    num_given: int
    num_cut: int
    needs: dict[str, str]

    @property
    def is_complete(self) -> bool:
        """Whether every text was finished."""
        return self.num_texts == self.num_given

    @property
    def is_in_sample(self) -> bool:
        """Whether priors were judged on the text that they were fitted to, because there is only one."""
        return self.heads.num_sequences < 2

    def explained(self) -> NDArray[np.float64]:
        """(A, H) explained divergence: held out where there are several sequences, else in sample."""
        name = "explained_in_sample" if self.is_in_sample else "explained"
        return self._of_priors(lambda report: getattr(report, name))

    def explained_interval(self) -> NDArray[np.float64]:
        """(A, H, 2) its 95% interval over the sequences; NaN in sample."""
        low, high = (self._of_priors(partial(_side, side=side)) for side in (0, 1))
        return np.stack([low, high], -1)

    def fails(self) -> NDArray[np.bool_]:
        """(A, H) whether a prior was fitted that is not surely better than uniform attention on other texts."""
        if self.is_in_sample:
            return np.zeros_like(self.explained(), dtype=bool)
        return ~np.isnan(self.explained()) & ~(self._of_priors(lambda report: report.holds) > 0)

    def _of_priors(self, values: Callable[[ImplicitPriorReport], NDArray[Any]]) -> NDArray[np.float64]:
        """(A, H) one number a fitted head; NaN elsewhere."""
        grid = np.full_like(self.heads.mean["entropy"], np.nan)
        for a, layer in enumerate(self.heads.layers):
            if layer in self.priors:
                found = values(self.priors[layer])
                grid[a, : len(found)] = found
        return grid

    def sink_kinds(self) -> list[list[str]]:
        """A lists of H words: what the sink of a head is in most of its sequences; "" where values were not seen."""
        mean = self.heads.mean
        if "dominant sink" not in mean:
            return [[""] * mean["entropy"].shape[1] for _ in self.heads.layers]
        shares = np.stack([mean[name] for name in ("no-operation", "broadcast", "dominant sink")], axis=-1)
        return [[_kind(*share) for share in row] for row in shares]


def _side(report: ImplicitPriorReport, side: int) -> NDArray[np.float64]:
    return report.interval[:, side]


def _kind(no_operation: float, broadcast: float, sink: float) -> str:
    if np.isnan(no_operation):
        return ""
    for share, word in ((no_operation, "no-operation"), (broadcast, "broadcast")):
        if share > 0.5:
            return word
    return "other" if sink > 0.5 else "none"
