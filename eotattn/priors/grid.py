"""GridPrior: priors on two-dimensional positions, with a class token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eotattn.checks import check_positive_int, require
from eotattn.priors.base import LogPrior, check_prior
from eotattn.priors.lanes import LaneFactors, computing_dtype

__all__ = ["ClassTokenPrior", "GridPrior", "grid_positions"]

#: Both coordinates of a class token: it lies nowhere on the grid.
NOWHERE = -1


def grid_positions(
    height: int, width: int, *, class_token: bool = False, device: torch.device | str | None = None
) -> Tensor:
    """Positions (row, column) of a grid in row-major order, with a class token before them if asked for.

    Returns:
        (height * width, 2) int64, or one row more; the class token's coordinates are negative.

    Example:
        >>> grid_positions(1, 2, class_token=True).tolist()
        [[-1, -1], [0, 0], [0, 1]]
    """
    check_positive_int("grid_positions", "height", height)
    check_positive_int("grid_positions", "width", width)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    cells = torch.cartesian_prod(rows, columns)
    nowhere = torch.full((1, 2), NOWHERE, device=device)
    return torch.cat([nowhere, cells]) if class_token else cells


class GridPrior(LogPrior):
    """A prior of the rows plus a prior of the columns; zero where the query or the key is a class token.

    Each axis has its own prior, so both can have the full range of frequencies. A class token is a position with
    negative coordinates. Add :class:`ClassTokenPrior` to let the class token be a sink.

    Args:
        row_prior: Prior of the row coordinate.
        column_prior: Prior of the column coordinate, with as many heads.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), section 4 (relative lanes summed over two axes).

    Example:
        >>> from eotattn.priors import FourierPrior
        >>> prior = GridPrior(FourierPrior(2, 3, 4.0, 16.0), FourierPrior(2, 3, 4.0, 16.0))
        >>> prior.dense(grid_positions(2, 3), grid_positions(2, 3)).shape
        torch.Size([2, 6, 6])
    """

    num_coordinates = 2

    def __init__(self, row_prior: LogPrior, column_prior: LogPrior) -> None:
        check_prior("GridPrior", "row_prior", row_prior)
        check_prior("GridPrior", "column_prior", column_prior)
        super().__init__(row_prior.num_heads)
        heads = (row_prior.num_heads, column_prior.num_heads)
        require(heads[0] == heads[1], "GridPrior", "column_prior", "have the heads of row_prior", heads, "Rebuild one")
        for name, axis in (("row_prior", row_prior), ("column_prior", column_prior)):
            require(axis.num_coordinates == 1, "GridPrior", name, "act on one coordinate", axis, "Pass a 1-D prior")
        self.row_prior, self.column_prior = row_prior, column_prior

    @property
    def axes(self) -> tuple[LogPrior, LogPrior]:
        """The priors of the row and of the column coordinate."""
        return self.row_prior, self.column_prior

    @property
    def has_lanes(self) -> bool:
        """Whether both axes have lanes."""
        return all(axis.has_lanes for axis in self.axes)

    def check_positions(self, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
        """Raise unless both lie on a grid, and each axis understands its coordinate."""
        super().check_positions(query_positions, key_positions)
        if query_positions is not None and key_positions is not None:
            query, key = query_positions.clamp(min=0), key_positions.clamp(min=0)
            for c, axis in enumerate(self.axes):
                axis.check_positions(query[..., c], key[..., c])

    def reset_parameters(self) -> None:
        """Reset both axes."""
        for axis in self.axes:
            axis.reset_parameters()

    def evaluate(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The sum over the axes, in nats; zero at class tokens."""
        on_grid = (query_position >= 0).all(-1) & (key_position >= 0).all(-1)
        query, key = query_position.clamp(min=0), key_position.clamp(min=0)
        rows = self.row_prior.evaluate(head, query[..., 0], key[..., 0])
        total = rows + self.column_prior.evaluate(head, query[..., 1], key[..., 1])
        return torch.where(on_grid, total, 0.0)

    def factors(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype) -> tuple[LaneFactors, ...]:
        """The factors of both axes with class tokens blanked; row terms become lanes, since class keys lack them."""
        query_on = (query_positions >= 0).all(-1)[..., None, :, None]
        key_on = (key_positions >= 0).all(-1)[..., None, :, None]
        query, key = query_positions.clamp(min=0), key_positions.clamp(min=0)
        parts: list[LaneFactors] = []
        for c, axis in enumerate(self.axes):
            for part in axis.factors(query[..., c], key[..., c], dtype=dtype):
                if part.exact == "both":  # the gradient of a row term, which has a lane here
                    continue
                parts.append(LaneFactors(part.query * query_on, part.key * key_on, exact=part.exact))
                if part.row is not None:
                    row = part.row.unsqueeze(-1) * query_on
                    parts.append(LaneFactors(row, key_on.to(row.dtype), exact="key"))
        return tuple(parts)


class ClassTokenPrior(LogPrior):
    """A learned log-prior of the class token as a key: the grid's attention sink. One lane. Starts neutral.

    Args:
        num_heads: Number of query heads H.

    Attributes:
        class_token: (H,) nats.

    Source:
        The first-token term of Litman and Guo 2026 (arXiv 2601.15380), moved to grids; original.

    Example:
        >>> ClassTokenPrior(2).num_lanes()
        1
    """

    num_coordinates = 2

    def __init__(self, num_heads: int) -> None:
        super().__init__(num_heads)
        self.class_token = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Neutral start."""
        nn.init.zeros_(self.class_token)

    def evaluate(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The head's weight where the key is the class token, in nats."""
        is_class = (key_position < 0).all(-1) & torch.ones_like(query_position[..., 0], dtype=torch.bool)
        return self.class_token[head] * is_class.to(key_position.dtype)

    def factors(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype) -> tuple[LaneFactors, ...]:
        """One lane: the weight against the indicator of the class token."""
        computing = computing_dtype(dtype)
        key = (key_positions < 0).all(-1)[..., None, :, None].to(computing)
        shape = (*query_positions.shape[:-2], self.num_heads, query_positions.shape[-2], 1)
        return (LaneFactors(self.class_token.to(computing)[:, None, None].expand(shape), key, exact="key"),)
