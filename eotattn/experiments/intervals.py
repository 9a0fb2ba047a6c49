"""Intervals over seeds: how well a mean over few independent runs is known, and what that decides."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from eotattn.checks import require

__all__ = ["SeedInterval", "claim", "verdict"]


@dataclass(frozen=True)
class SeedInterval:
    """Mean of independent runs and the half width of its 95 % interval, from Student's t of one degree less than runs.

    Attributes:
        mean: Of the values.
        half_width: NaN where there is one value alone.
        count: Number of values.
    """

    mean: float
    half_width: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> SeedInterval:
        """The interval of at least one value, one a seed.

        Example:
            >>> SeedInterval.of([1.0, 2.0, 3.0])
            SeedInterval(mean=2.0, half_width=2.484..., count=3)
        """
        require(len(values) > 0, "SeedInterval", "values", "hold at least one run", values, "Run a seed")
        mean = math.fsum(values) / len(values)
        if len(values) == 1:
            return cls(mean, math.nan, 1)
        quantile = float(stats.t.ppf(0.975, len(values) - 1))
        return cls(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)), len(values))

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half_width

    def __format__(self, spec: str) -> str:
        """Mean and half width, both by ``spec``; without the half width where there is none."""
        if math.isnan(self.half_width):
            return f"{self.mean:{spec}} (one seed)"
        return f"{self.mean:{spec}} ± {self.half_width:{spec.lstrip('+')}}"


def verdict(interval: SeedInterval) -> str:
    """Whether a number is above zero: ``"held"``, ``"refuted"``, or ``"undecided"`` where its interval holds zero.

    Example:
        >>> [verdict(SeedInterval.of(values)) for values in ([1.0, 1.1], [-1.0, -1.1], [1.0, -1.0], [1.0])]
        ['held', 'refuted', 'undecided', 'undecided']
    """
    if interval.low > 0:
        return "held"
    return "refuted" if interval.high < 0 else "undecided"


def claim(text: str, margin: SeedInterval, numbers: str) -> str:
    """One line of Markdown: a claim, its verdict, and the numbers; the claim holds where ``margin`` is above zero."""
    return f"- **{text}: {verdict(margin)}.** {numbers}"
