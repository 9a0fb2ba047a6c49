"""What the two-part prior is fitted to: lag mass, column mass and entropy of every sequence, at one size.

Legend: N sequences, H heads, L positions on a line, F tokens off the line, h rows and w columns of a grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.checks import check_positive_int, require
from eotattn.diagnostics.grid_statistics import GridStatistics, grid_line
from eotattn.diagnostics.lag_key_model import LagKeyModel, RowGroup

__all__ = ["MarginProblem"]

OWNER = "fit_prior"


@dataclass(frozen=True)
class MarginProblem:
    """Margins of every sequence, at one size L.

    Args:
        lag_mass: (N, H, 2 L - 1) sums of weights by lag, between positions of the line.
        column_mass: (N, H, L + F) sums of weights by key.
        entropy: (N, H) sums over queries, nats.
        present: (N, L + F) true where a sequence has a token.
        lag_seen: (2 L - 1,) true at admissible lags.
        is_causal: Whether only keys up to the query are admissible.
        smoothing: Share of the uniform prior mixed into targets.
        num_free: F, class tokens, which lie off the line.
    """

    lag_mass: Tensor
    column_mass: Tensor
    entropy: Tensor
    present: Tensor
    lag_seen: Tensor
    is_causal: bool
    smoothing: float
    num_free: int = 0

    @classmethod
    def of(
        cls, statistics: SequenceStatistics, is_causal: bool | None, window: int | None, smoothing: float
    ) -> MarginProblem:
        """Bring the statistics of one layer to one size."""
        lengths = statistics.num_queries.to(torch.int64)
        size = int(lengths.max())
        lags, reach = statistics.lag_mass, statistics.max_lag
        missing = max(0, size - 1 - reach)
        lags = functional.pad(lags, (missing, missing))
        centre = lags.shape[-1] // 2
        lags = lags[..., centre - size + 1 : centre + size]
        columns = functional.pad(statistics.column_mass, (0, max(0, size - statistics.column_mass.shape[-1])))
        back, ahead = _reach(statistics, lags)
        _check_pattern(is_causal, window, back, ahead, size)
        is_causal, at = ahead == 0, torch.arange(1 - size, size)
        seen = (at <= back) & (at >= -ahead)
        present = lengths[:, None] > torch.arange(size)
        return cls(lags, columns[..., :size], statistics.sums["entropy"], present, seen, is_causal, smoothing)

    @classmethod
    def of_grid(cls, statistics: GridStatistics, smoothing: float) -> MarginProblem:
        """Lay the grid out on a line: cell (r, c) at r (2 w - 1) + c, so that no two lags of two axes coincide."""
        free = statistics.num_free
        cells = grid_line(statistics.height, statistics.width)
        size = int(cells[-1]) + 1
        at = torch.cat([torch.arange(size, size + free), cells])  # class tokens come first in the sequence
        columns = statistics.column_mass.new_zeros(*statistics.entropy.shape, size + free)
        columns[..., at] = statistics.column_mass
        present = torch.zeros(statistics.num_sequences, size + free, dtype=torch.bool)
        present[:, at] = True
        lags = statistics.lag_mass.flatten(-2)
        seen = torch.ones(lags.shape[-1], dtype=torch.bool)
        return cls(lags, columns, statistics.entropy, present, seen, False, smoothing, num_free=free)

    def key_count(self, chosen: Tensor) -> Tensor:
        """(L + F,) sequences that have each position."""
        return self.present[chosen].double().sum(0)

    def groups(self, chosen: Tensor) -> tuple[RowGroup, ...]:
        """Causal rows never see how long a sequence is: one group. Otherwise one group a pattern of tokens."""
        if self.is_causal:
            count = self.key_count(chosen)
            return (RowGroup(count, torch.ones_like(count)),)
        patterns, counts = self.present[chosen].unique(dim=0, return_counts=True)
        return tuple(RowGroup(count * seen, seen) for count, seen in zip(counts, patterns.double(), strict=True))

    def uniform(self) -> LagKeyModel:
        """The uniform prior, for one head."""
        ones = torch.ones(1, self.present.shape[1], dtype=torch.float64)
        return LagKeyModel(self.lag_seen.double()[None], ones, self.num_free)

    def targets(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Margins of some sequences, mixed with a little of the uniform prior's."""
        flat, share = self.uniform(), self.smoothing
        groups = self.groups(chosen)
        lag = sum((flat.lag_rates(group) for group in groups), torch.zeros(())) * flat.lag
        column = sum((flat.column_rates(group) for group in groups), torch.zeros(()))
        lag_mass = (1 - share) * self.lag_mass[chosen].sum(0) + share * lag
        return lag_mass * self.lag_seen, (1 - share) * self.column_mass[chosen].sum(0) + share * column

    def divergences(self, model: LagKeyModel | None, chosen: Tensor) -> Tensor:
        """(N', H) sum over the queries of each sequence of KL(p_i || pi_i), nats; of the uniform prior for ``None``."""
        which = self.uniform() if model is None else model
        tiny = 1e-300
        lag = torch.where(self.lag_seen, which.lag.clamp(min=tiny).log(), 0.0)
        key = which.key.clamp(min=tiny).log()
        cross = (self.lag_mass[chosen] * lag).sum(-1) + (self.column_mass[chosen] * key).sum(-1)
        patterns, which_pattern = self.present[chosen].unique(dim=0, return_inverse=True)
        log_normalisers = torch.stack([self._log_normaliser(which, seen) for seen in patterns.double()])
        return (log_normalisers[which_pattern] - cross - self.entropy[chosen]).clamp(min=0)

    def _log_normaliser(self, model: LagKeyModel, seen: Tensor) -> Tensor:
        group = RowGroup(seen, torch.ones_like(seen) if self.is_causal else seen)
        return torch.where(seen > 0, model.normaliser(group).clamp(min=1e-300).log(), 0.0).sum(-1)


def _check_pattern(is_causal: bool | None, window: int | None, back: int, ahead: int, size: int) -> None:
    """Raise if the statistics contradict what the caller says of them."""
    remedy = "Drop the argument, or say the pattern where the statistics are made"
    fits = is_causal is None or size == 1 or is_causal == (ahead == 0)
    rule = f"be {ahead == 0}: queries of these statistics look {ahead} tokens ahead"
    require(fits, OWNER, "is_causal", rule, is_causal, remedy)
    if window is not None:
        fits = min(check_positive_int(OWNER, "window", window), size) == back + 1
        rule = f"be {back + 1}: queries of these statistics look {back} tokens back"
        require(fits, OWNER, "window", rule, window, remedy)


def _reach(statistics: SequenceStatistics, lags: Tensor) -> tuple[int, int]:
    """Farthest lags, back and ahead, at which a query admits a key; ``lags`` (N, H, 2 L - 1) are the masses by lag.

    Of the longest sequence, the first key is admitted by as many queries as look that far back, the last key by as many
    as look ahead; where a stored map holds zeros, and so hides queries, weight farther away proves more.
    """
    size = lags.shape[-1] // 2 + 1
    counts = statistics.column_count[statistics.num_queries.argmax()].amax(0)
    counts = functional.pad(counts, (0, max(0, size - len(counts))))
    held = (lags.sum((0, 1)) > 0).nonzero().squeeze(-1) - (size - 1)
    back, ahead = int(counts[0]) - 1, int(counts[size - 1]) - 1
    return max(back, int(held.max())), max(ahead, -int(held.min()))
