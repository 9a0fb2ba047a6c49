"""Free tables on grids: one learned number for every lag in two axes, and one for every cell as a key."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eotattn.checks import check_positive_int
from eotattn.priors.base import LogPrior
from eotattn.priors.terms import KeyTerm, Term, on_grid, same_for_all_queries

__all__ = ["GridKeyPrior", "GridTablePrior"]


class _GridTable(LogPrior):
    """What both tables share: a size, and a neutral start."""

    num_coordinates = 2

    def __init__(self, num_heads: int, height: int, width: int) -> None:
        super().__init__(num_heads)
        self.height = check_positive_int(type(self).__name__, "height", height)
        self.width = check_positive_int(type(self).__name__, "width", width)
        self.table = nn.Parameter(torch.empty(num_heads, *self._table_shape(), dtype=torch.float32))
        self.reset_parameters()

    def _table_shape(self) -> tuple[int, int]:
        return self.height, self.width

    def reset_parameters(self) -> None:
        """Neutral start: a table of zeros."""
        nn.init.zeros_(self.table)


class GridTablePrior(_GridTable):
    """A learned table of lags: log_prior = table[head, row lag, column lag]; zero where either is a class token.

    Lags beyond the grid take the value at its border. A free table is no finite inner product: it has no lanes.

    Args:
        num_heads: Number of query heads H.
        height: Rows of the grid.
        width: Columns of the grid.

    Attributes:
        table: (H, 2 height - 1, 2 width - 1) nats, lags query - key from -(height - 1) and -(width - 1).

    Source:
        Relative biases on windows in the manner of Liu et al. 2021 (arXiv 2103.14030).

    Example:
        >>> GridTablePrior(2, 3, 4).table.shape
        torch.Size([2, 5, 7])
    """

    def _table_shape(self) -> tuple[int, int]:
        return 2 * self.height - 1, 2 * self.width - 1

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The table's entry for both lags, in nats; zero at class tokens."""
        inside = on_grid(query_position) & on_grid(key_position)
        lag = (query_position - key_position).round().to(torch.int64)
        row = lag[..., 0].clamp(1 - self.height, self.height - 1) + self.height - 1
        column = lag[..., 1].clamp(1 - self.width, self.width - 1) + self.width - 1
        return torch.where(inside, self.table[head, row, column].to(query_position.dtype), 0.0)


class GridKeyPrior(_GridTable):
    """A learned table of keys: log_prior = table[head, row, column] of the key; zero where the key is a class token.

    Every query sees it, a class token too; add :class:`ClassTokenPrior` for the class token as a key. One lane.

    Args:
        num_heads: Number of query heads H.
        height: Rows of the grid; positions beyond it take the last row.
        width: Columns of the grid, likewise.

    Attributes:
        table: (H, height, width) nats.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), appendix F, theorem 4, on a grid with a free u.

    Example:
        >>> GridKeyPrior(2, 3, 4).num_lanes()
        1
    """

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The table's entry for the key, in nats; zero at class tokens."""
        inside = on_grid(key_position) & torch.ones_like(query_position[..., 0], dtype=torch.bool)
        row, column = self._cell(key_position)
        return torch.where(inside, self.table[head, row, column].to(key_position.dtype), 0.0)

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """One term: the cell's number, the same for every query."""
        return (KeyTerm(same_for_all_queries(2), self._of_keys),)

    def _of_keys(self, positions: Tensor) -> Tensor:
        row, column = self._cell(positions)
        return (self.table[:, row, column] * on_grid(positions)).movedim(0, -2)  # (H, K) or (H, B, K) before

    def _cell(self, position: Tensor) -> tuple[Tensor, Tensor]:
        cell = position.double().round().to(torch.int64)
        return cell[..., 0].clamp(0, self.height - 1), cell[..., 1].clamp(0, self.width - 1)
