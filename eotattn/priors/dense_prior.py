"""DensePrior: a log-prior given as a matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eotattn.checks import check_floating, check_no_nan, require
from eotattn.priors.base import LogPrior

__all__ = ["DensePrior"]


class DensePrior(LogPrior):
    """A given log-prior matrix, looked up by position, one for all samples or one a sample. It has no lanes.

    Args:
        log_prior: (H, N, M), or (B, H, N, M) for B samples, nats; -inf where a key is inadmissible. Copied, in float32
            or float64.
        trainable: Whether the matrix trains; -inf stays -inf. A given one is a buffer that travels in the state dict.

    Attributes:
        matrix: The matrix, a buffer or a parameter.

    Example:
        >>> prior = DensePrior(torch.eye(3)[None])
        >>> prior.dense(torch.tensor([2]), torch.tensor([0, 2]))
        tensor([[[0., 1.]]])
    """

    matrix: Tensor

    def __init__(self, log_prior: Tensor, *, trainable: bool = False) -> None:
        check_floating("DensePrior", "log_prior", log_prior)
        is_matrix = log_prior.dim() in (3, 4) and log_prior.numel() > 0
        rule = "have shape (H, N, M) or (B, H, N, M)"
        require(is_matrix, "DensePrior", "log_prior", rule, log_prior, "Add the head axis")
        check_no_nan("DensePrior", "log_prior", log_prior, allow_negative_inf=True)
        super().__init__(log_prior.shape[-3])
        self.num_samples = log_prior.shape[0] if log_prior.dim() == 4 else None
        wide = log_prior if log_prior.dtype == torch.float64 else log_prior.float()
        self._start = wide.detach().clone() if trainable else None
        if trainable:
            self.matrix = nn.Parameter(wide.detach().clone())
        else:
            self.register_buffer("matrix", wide.detach().clone())

    def reset_parameters(self) -> None:
        """The matrix given at construction, if it trains."""
        if self._start is not None:
            with torch.no_grad():
                self.matrix.copy_(self._start)

    def check_positions(self, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
        """Raise unless both are positions that lie in the matrix; a negative one would silently count from its end."""
        super().check_positions(query_positions, key_positions)
        *_, queries, keys = self.matrix.shape
        given = (("query_positions", query_positions, queries), ("key_positions", key_positions, keys))
        for name, positions, size in given:
            if positions is not None:
                inside = bool((positions >= 0).all() & (positions < size).all())
                span = f"{positions.min().item()} to {positions.max().item()}"
                require(inside, "DensePrior", name, f"lie in 0 to {size - 1}", span, "Give a larger matrix")

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The matrix's entry, in nats; of a matrix a sample, those of all samples before the other axes."""
        query, key = query_position.to(torch.int64), key_position.to(torch.int64)
        if self.num_samples is None:
            return self.matrix[head, query, key].to(query_position.dtype)
        sample = torch.arange(self.num_samples, device=query.device)[:, None, None, None]
        return self.matrix[sample, head, query, key].to(query_position.dtype)
