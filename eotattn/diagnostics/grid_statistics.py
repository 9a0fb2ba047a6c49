"""Statistics of attention between the cells of a grid: lags in two axes, for reading priors out of vision models.

Legend: B batch, N sequences, H heads, L = F + h w tokens: F class tokens (none or one), then h rows and w columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.attention.statistics.block_statistics import block_statistics
from eotattn.attention.statistics.score_rows import ScoreSource, block_spans
from eotattn.checks import check_positive_int, require

__all__ = ["GridStatistics", "grid_line"]

OWNER = "GridStatistics"


def grid_line(height: int, width: int) -> Tensor:
    """(h w,) places on a line, row by row with gaps of w - 1, so that every lag of two axes is one lag of the line.

    Example:
        >>> grid_line(2, 3).tolist()
        [0, 1, 2, 5, 6, 7]
    """
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return (rows * (2 * width - 1) + columns).flatten()


@dataclass(frozen=True, eq=False)
class GridStatistics:
    """Sums over the queries of each of N sequences on one grid, on the CPU in float64.

    Attributes:
        lag_mass: (N, H, 2 h - 1, 2 w - 1) weights between cells by row lag and column lag, query - key.
        column_mass: (N, H, L) weights by key, over all queries.
        entropy: (N, H) sum over all queries, nats.
    """

    lag_mass: Tensor
    column_mass: Tensor
    entropy: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, source: ScoreSource, height: int, width: int) -> GridStatistics:
        """Sum over one attention call, a block of rows at a time.

        Args:
            source: Its logits, e.g. :class:`~eotattn.attention.statistics.score_rows.ScoreRows`, or ``WeightRows`` of
                stored maps.
            height: Rows h of the grid.
            width: Columns w of the grid.

        Raises:
            ValueError: If the call is not full self-attention over h w cells, with or without one class token before.

        Example:
            >>> from eotattn.attention.statistics.score_rows import WeightRows
            >>> GridStatistics.of(WeightRows(torch.full((1, 1, 5, 5), 0.2)), 2, 2).lag_mass[0, 0].round(decimals=3)
            tensor([[0.2000, 0.4000, 0.2000],
                    [0.4000, 0.8000, 0.4000],
                    [0.2000, 0.4000, 0.2000]], dtype=torch.float64)
        """
        free = _check(source, height, width)
        batch, heads, tokens, _ = source.shape
        place = grid_line(height, width).to(source.device)
        reach = int(place[-1])
        lags, columns, entropy = (
            torch.zeros(batch, heads, *size, dtype=torch.float64, device=source.device)
            for size in ((2 * reach + 1,), (tokens,), ())
        )
        chosen = torch.zeros(batch, 1, dtype=torch.int64, device=source.device)
        for start, stop in block_spans(source):
            block = source.block(start, stop)
            is_full = block.admissible is None or bool(block.admissible.all())
            require(is_full, OWNER, "attention", "reach every token", "a mask", "Grids need full self-attention")
            weights, rows = block_statistics(block, chosen, None, None)
            columns += weights.sum(-2).double()
            entropy += rows["entropy"].sum(-1).double()
            first = max(start, free)
            lag = place[first - free : stop - free, None] - place + reach
            between = weights[:, :, first - start :, free:].double()
            lags.index_add_(-1, lag.flatten(), between.flatten(-2))
        shape = (batch, heads, 2 * height - 1, 2 * width - 1)
        return cls(lags.view(shape).cpu(), columns.cpu(), entropy.cpu())

    @property
    def height(self) -> int:
        """Rows h."""
        return (self.lag_mass.shape[-2] + 1) // 2

    @property
    def width(self) -> int:
        """Columns w."""
        return (self.lag_mass.shape[-1] + 1) // 2

    @property
    def num_free(self) -> int:
        """F, class tokens."""
        return self.column_mass.shape[-1] - self.height * self.width

    @property
    def num_sequences(self) -> int:
        """N."""
        return self.entropy.shape[0]

    def heads(self, index: list[int]) -> GridStatistics:
        """Only the given heads."""
        return GridStatistics(self.lag_mass[:, index], self.column_mass[:, index], self.entropy[:, index])

    def __add__(self, other: GridStatistics) -> GridStatistics:
        """Statistics of the sequences of both, in this order."""
        if not isinstance(other, GridStatistics):
            return NotImplemented
        same = self.lag_mass.shape[1:] == other.lag_mass.shape[1:] and self.num_free == other.num_free
        rule = f"have heads and grid {tuple(self.lag_mass.shape[1:])}"
        require(same, OWNER, "the other", rule, other.lag_mass.shape[1:], "Add statistics of one layer")
        pairs = ((self.lag_mass, other.lag_mass), (self.column_mass, other.column_mass), (self.entropy, other.entropy))
        return GridStatistics(*(torch.cat(pair) for pair in pairs))


def _check(source: ScoreSource, height: int, width: int) -> int:
    """The number of class tokens."""
    for name, size in (("height", height), ("width", width)):
        check_positive_int(OWNER, name, size)
    queries, keys = source.shape[2:]
    free = queries - height * width
    fits = queries == keys and free in (0, 1)
    rule = f"be square with {height} x {width} tokens, or one more"
    require(fits, OWNER, "attention", rule, (queries, keys), "Name the grid of the model")
    return free
