"""What interventions cost: changes of the loss with paired intervals over texts.

Legend: N texts, I interventions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eotattn.checks import check_installed

__all__ = ["Effect", "InterventionReport", "PairedMean"]

Array = NDArray[np.float64]

#: Words for a difference that lies below zero, above it, or on both sides.
OF_LOSS = ("better", "worse")
OF_RANDOM = ("less than random", "more than random")
UNDECIDED = "undecided"
#: Words for an intervention that found no head to change, on any part of the texts.
NO_HEADS = "no such heads"


@dataclass(frozen=True)
class PairedMean:
    """Mean of a difference over texts, with its 95 % interval by Student's t; both ends are NaN for a single text.

    Attributes:
        mean: Nats a token.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, differences: Array) -> PairedMean:
        """The interval of (N,) differences, one a text.

        Example:
            >>> PairedMean.of(np.array([1.0, 2.0, 3.0]))
            PairedMean(mean=2.0, low=-0.484..., high=4.484...)
        """
        from scipy.special import stdtrit

        mean, count = float(differences.mean()), len(differences)
        if count < 2:
            return cls(mean, math.nan, math.nan)
        half = float(stdtrit(count - 1, 0.975)) * float(differences.std(ddof=1)) / math.sqrt(count)
        return cls(mean, mean - half, mean + half)

    def verdict(self, words: tuple[str, str]) -> str:
        """The first word if all of the interval lies below zero, the second if above, else "undecided"."""
        return words[0] if self.high < 0 else words[1] if self.low > 0 else UNDECIDED

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True, eq=False)
class Effect:
    """One intervention.

    Attributes:
        name: What was done.
        num_heads: Heads that it was done to, the mean over splits.
        losses: (N,) loss of every text under it, nats a token.
        random: (N,) the same with as many heads drawn at random, the mean over the groups; ``None`` without controls.
    """

    name: str
    num_heads: float
    losses: Array
    random: Array | None


@dataclass(frozen=True, eq=False, repr=False)
class InterventionReport:
    """Losses of texts without and with every intervention.

    Attributes:
        base: (N,) loss of every text as the model is, nats a token.
        split: (N,) which part of the texts a text belongs to; priors were fitted to the others.
        effects: I interventions.
        num_controls: Random groups behind every control.
    """

    base: Array
    split: NDArray[np.int64]
    effects: tuple[Effect, ...]
    num_controls: int

    def __getitem__(self, name: str) -> Effect:
        """The effect of that name."""
        return next(effect for effect in self.effects if effect.name == name)

    def change(self, effect: Effect) -> PairedMean:
        """How much the loss rose, nats a token."""
        return PairedMean.of(effect.losses - self.base)

    def against_random(self, effect: Effect) -> PairedMean | None:
        """How much more it rose than with random heads in their place; ``None`` without controls.

        The interval speaks of texts: the groups drawn are what they are.
        """
        return None if effect.random is None else PairedMean.of(effect.losses - effect.random)

    def by_split(self, effect: Effect) -> list[tuple[float, float]]:
        """Mean loss without and with the intervention on each part of the texts."""
        parts = [self.split == part for part in np.unique(self.split)]
        return [(float(self.base[part].mean()), float(effect.losses[part].mean())) for part in parts]

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns of a table, one row an intervention."""
        rows: list[dict[str, Any]] = []
        for effect in self.effects:
            change, against = self.change(effect), self.against_random(effect)
            row = {"intervention": effect.name, "heads": effect.num_heads, "loss": float(effect.losses.mean())}
            verdict = change.verdict(OF_LOSS) if effect.num_heads else NO_HEADS
            row |= {"change": change.mean, "low": change.low, "high": change.high, "verdict": verdict}
            nan = PairedMean(math.nan, math.nan, math.nan)
            random = math.nan if effect.random is None else float(effect.random.mean())
            row |= {"random_loss": random, "against_random": (against or nan).mean}
            row |= {"against_low": (against or nan).low, "against_high": (against or nan).high}
            rows.append(row | {"against_verdict": "" if against is None else against.verdict(OF_RANDOM)})
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}

    def to_frame(self) -> Any:
        """The table as a ``pandas.DataFrame``."""
        check_installed("InterventionReport.to_frame", "analysis", "pandas")
        import pandas

        return pandas.DataFrame(self.to_dict())

    def __repr__(self) -> str:
        """One line an intervention."""
        return "\n".join(_aligned([self._heading(), *map(self._cells, self.effects)]) + self._notes())

    def _heading(self) -> list[str]:
        return ["intervention", "heads", "loss", "change, nats a token", "verdict", "random", "against random", ""]

    def _cells(self, effect: Effect) -> list[str]:
        change, against = self.change(effect), self.against_random(effect)
        cells = [effect.name, f"{effect.num_heads:.4g}", f"{effect.losses.mean():.3f}"]
        cells += [str(change), change.verdict(OF_LOSS)] if effect.num_heads else [NO_HEADS, ""]
        if against is None or effect.random is None:
            return [*cells, "", "", ""]
        return [*cells, f"{effect.random.mean():.3f}", str(against), against.verdict(OF_RANDOM)]

    def _notes(self) -> list[str]:
        texts = (
            f"{len(self.base)} texts, loss {self.base.mean():.3f} as the model is; 95 % intervals, paired over texts."
        )
        return [f"{texts} Random: mean of {self.num_controls} groups of as many heads." if self.num_controls else texts]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
