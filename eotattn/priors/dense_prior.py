"""DensePrior: a log-prior given as a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_no_nan, require
from eotattn.priors.base import LogPrior

__all__ = ["DensePrior"]


class DensePrior(LogPrior):
    """A given log-prior matrix, looked up by position; not trained. It has no lanes.

    Args:
        log_prior: (H, N, M), nats; -inf where a key is inadmissible. Copied, in float32 or float64.

    Attributes:
        matrix: The matrix, a buffer that travels in the state dict.

    Example:
        >>> prior = DensePrior(torch.eye(3)[None])
        >>> prior.dense(torch.tensor([2]), torch.tensor([0, 2]))
        tensor([[[0., 1.]]])
    """

    matrix: Tensor

    def __init__(self, log_prior: Tensor) -> None:
        check_floating("DensePrior", "log_prior", log_prior)
        is_matrix = log_prior.dim() == 3 and log_prior.numel() > 0
        require(is_matrix, "DensePrior", "log_prior", "have shape (H, N, M)", log_prior, "Add the head axis")
        check_no_nan("DensePrior", "log_prior", log_prior, allow_negative_inf=True)
        super().__init__(log_prior.shape[0])
        wide = log_prior if log_prior.dtype == torch.float64 else log_prior.float()
        self.register_buffer("matrix", wide.detach().clone())

    def check_positions(self, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
        """Raise unless both are positions that lie in the matrix; a negative one would silently count from its end."""
        super().check_positions(query_positions, key_positions)
        _, queries, keys = self.matrix.shape
        given = (("query_positions", query_positions, queries), ("key_positions", key_positions, keys))
        for name, positions, size in given:
            if positions is not None:
                inside = bool((positions >= 0).all() & (positions < size).all())
                span = f"{positions.min().item()} to {positions.max().item()}"
                require(inside, "DensePrior", name, f"lie in 0 to {size - 1}", span, "Give a larger matrix")

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The matrix's entry, in nats."""
        entry = self.matrix[head, query_position.to(torch.int64), key_position.to(torch.int64)]
        return entry.to(query_position.dtype)
