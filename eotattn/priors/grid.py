"""GridPrior: priors on positions of several coordinates, with a class token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eotattn.checks import check_positive_int, require
from eotattn.priors.base import CombinedPrior, LogPrior, check_prior
from eotattn.priors.bilinear import BilinearPrior
from eotattn.priors.terms import KeyTerm, Term, on_grid

__all__ = ["ClassTokenPrior", "GridPrior", "grid_positions"]

#: Every coordinate of a class token: it lies nowhere on the grid.
NOWHERE = -1


def grid_positions(
    height: int, width: int, *, class_token: bool = False, device: torch.device | str | None = None
) -> Tensor:
    """Positions (row, column) of a grid in row-major order, with a class token before them if asked for.

    Returns:
        (height * width, 2) int64, or one row more; the class token's coordinates are -1.

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


class GridPrior(CombinedPrior):
    """A sum of priors, one of each coordinate; zero where the query or the key is a class token.

    Each axis has its own prior, so all can have the full range of frequencies. A class token is a position whose
    coordinates are -1. Add :class:`ClassTokenPrior` to let the class token be a sink.

    Args:
        axes: One prior a coordinate, all with as many heads: rows and columns of an image, frames before them, ...

    Attributes:
        axes: The priors, in order.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), section 4 (relative lanes summed over two axes).

    Example:
        >>> from eotattn.priors import FourierPrior
        >>> prior = GridPrior(FourierPrior(2, 3, 4.0, 16.0), FourierPrior(2, 3, 4.0, 16.0))
        >>> prior.dense(grid_positions(2, 3), grid_positions(2, 3)).shape
        torch.Size([2, 6, 6])
    """

    def __init__(self, *axes: LogPrior) -> None:
        require(len(axes) > 1, "GridPrior", "axes", "be two or more priors", axes, "Pass one a coordinate")
        for axis in axes:
            check_prior("GridPrior", "axes", axis)
            require(axis.num_coordinates == 1, "GridPrior", "axes", "act on one coordinate", axis, "Pass 1-D priors")
            remedy = "Add what reads the tokens to the grid's prior"
            require(not axis.reads_tokens, "GridPrior", "axes", "read positions alone", type(axis).__name__, remedy)
        heads = tuple(axis.num_heads for axis in axes)
        require(len(set(heads)) == 1, "GridPrior", "axes", "agree in num_heads", heads, "Rebuild one of them")
        super().__init__(axes, heads[0])
        self.num_coordinates = len(axes)
        if self.has_lanes:
            self.terms()  # names its features before a graph is traced

    @property
    def axes(self) -> Sequence[LogPrior]:
        """The priors of the coordinates."""
        return self.parts

    def check_positions(self, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
        """Raise unless both lie on a grid, and each axis understands its coordinate."""
        LogPrior.check_positions(self, query_positions, key_positions)
        if query_positions is not None and key_positions is not None:
            query, key = query_positions.clamp(min=0), key_positions.clamp(min=0)
            for c, axis in enumerate(self.axes):
                axis.check_positions(query[..., c], key[..., c])

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The sum over the axes, in nats; zero at class tokens."""
        query, key = query_position.clamp(min=0), key_position.clamp(min=0)
        parts = [axis.log_prior(head, query[..., c], key[..., c]) for c, axis in enumerate(self.axes)]
        inside = on_grid(query_position) & on_grid(key_position)
        return torch.where(inside, torch.stack(torch.broadcast_tensors(*parts)).sum(0), 0.0)

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """The terms of all axes, blank at class tokens."""
        return tuple([term.on_axis(c) for c, axis in enumerate(self.axes) for term in axis.terms()])


class ClassTokenPrior(BilinearPrior):
    """A learned log-prior of the class token as a key: the grid's attention sink. One lane. Starts neutral.

    Args:
        num_heads: Number of query heads H.
        num_coordinates: Coordinates C of the grid.

    Attributes:
        class_token: (H,) nats.

    Source:
        The first-token term of Litman and Guo 2026 (arXiv 2601.15380), moved to grids.

    Example:
        >>> ClassTokenPrior(2).num_lanes()
        1
    """

    def __init__(self, num_heads: int, num_coordinates: int = 2) -> None:
        super().__init__(num_heads)
        self.num_coordinates = check_positive_int("ClassTokenPrior", "num_coordinates", num_coordinates, minimum=2)
        self.class_token = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Neutral start."""
        nn.init.zeros_(self.class_token)

    def query_features(self, positions: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(positions[..., :1])

    def key_features(self, positions: Tensor) -> Tensor:
        """Whether the key is the class token."""
        return (~on_grid(positions)).to(torch.float64).unsqueeze(-1)

    def weights(self) -> Tensor:
        """The height of the sink."""
        return self.class_token[:, None, None]
