"""Free tables on grids: one learned number for every lag in two axes, and one for every cell as a key."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.checks import check_floating, check_positive_int, check_shape
from eotattn.priors.base import LogPrior
from eotattn.priors.terms import FEATURES, Features, KeyTerm, Term, on_grid, same_for_all_queries

__all__ = ["GridKeyPrior", "GridTablePrior"]


#: Cells of a grid whose lags have lanes at most, one a cell.
MOST_CELLS = 64


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

    def _cell(self, position: Tensor) -> tuple[Tensor, Tensor]:
        cell = position.double().round().to(torch.int64)
        return cell[..., 0].clamp(0, self.height - 1), cell[..., 1].clamp(0, self.width - 1)


class GridTablePrior(_GridTable):
    """A learned table of lags: log_prior = table[head, row lag, column lag]; zero where either is a class token.

    Positions beyond the grid count as its border. Its rank is at most the number of cells: a grid of up to 64 cells has
    lanes, one for every cell of the key, such as Swin's windows of 7 x 7; a larger one has none.

    Args:
        num_heads: Number of query heads H.
        height: Rows of the grid.
        width: Columns of the grid.

    Attributes:
        table: (H, 2 height - 1, 2 width - 1) nats, lags query - key from -(height - 1) and -(width - 1).

    Source:
        Liu et al. 2021 (arXiv 2103.14030), equation 4: relative biases on windows.

    Example:
        >>> GridTablePrior(2, 3, 4).table.shape
        torch.Size([2, 5, 7])
    """

    def __init__(self, num_heads: int, height: int, width: int) -> None:
        super().__init__(num_heads, height, width)
        if self.has_lanes:
            self.terms()  # names its features before a graph is traced

    def _table_shape(self) -> tuple[int, int]:
        return 2 * self.height - 1, 2 * self.width - 1

    @classmethod
    def from_swin(cls, table: Tensor, height: int, width: int) -> GridTablePrior:
        """The prior of a trained Swin block: its ``relative_position_bias_table``, copied.

        Args:
            table: ((2 height - 1) (2 width - 1), H) nats.
            height: Rows of its window.
            width: Columns of its window.

        Raises:
            ValueError: If the table is not of that shape.
        """
        owner, lags = "GridTablePrior.from_swin", (2 * height - 1) * (2 * width - 1)
        check_floating(owner, "table", table)
        check_shape(owner, "table", table, (lags, None), f"Pass the table of windows of {height} x {width}")
        prior = cls(table.shape[1], height, width).to(table.device)
        with torch.no_grad():
            prior.table.copy_(table.T.unflatten(1, prior.table.shape[1:]))
        return prior

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The table's entry for both lags, in nats; zero at class tokens."""
        inside = on_grid(query_position) & on_grid(key_position)
        (query_row, query_column), (key_row, key_column) = self._cell(query_position), self._cell(key_position)
        row, column = query_row - key_row + self.height - 1, query_column - key_column + self.width - 1
        return torch.where(inside, self.table[head, row, column].to(query_position.dtype), 0.0)

    @property
    def has_lanes(self) -> bool:
        """Whether the grid is small enough for a lane a cell."""
        return self.height * self.width <= MOST_CELLS

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """One term: which cell the query is in, times the table, times which cell the key is in."""
        if not self.has_lanes:
            return super().terms()
        name = f"cells of {self.height} x {self.width}"
        if name not in FEATURES:
            FEATURES[name] = self._features(name)
        return (Term(FEATURES[name], (self.table.flatten(1),)),)

    def _features(self, name: str) -> Features:
        height, width = self.height, self.width
        cells = [divmod(cell, width) for cell in range(height * width)]

        def which(positions: Tensor) -> Tensor:
            row, column = (positions[..., c].round().clamp(0, size - 1) for c, size in enumerate((height, width)))
            each = functional.one_hot((row * width + column).to(torch.int64), height * width)
            return each.to(torch.float64) * on_grid(positions).unsqueeze(-1)

        def lag(q: int, k: int) -> int:
            (row, column), (key_row, key_column) = cells[q], cells[k]
            return (row - key_row + height - 1) * (2 * width - 1) + column - key_column + width - 1

        pairs = tuple((lag(q, k), q, k, 1.0) for q in range(len(cells)) for k in range(len(cells)))
        return Features(name, which, which, entries=pairs, num_features=(len(cells), len(cells)))


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
