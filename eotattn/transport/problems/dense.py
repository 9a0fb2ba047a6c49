"""The affinity of pairs that are at hand as tensors, with half-steps in place."""

# Legend: n queries, m keys; the leading dimensions (...) are a batch.

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from eotattn.transport.arithmetic import product
from eotattn.transport.problems.affinity import Affinity, Exchange, Number, Rows, broadcast, pairwise, peaked_logits
from eotattn.transport.problems.scaling import Scaling, softmax_rows, softmax_shape

__all__ = ["DenseAffinity"]


class DenseAffinity(Affinity):
    """Score (..., n, m), cost units, and log-prior (..., n, m), nats, or ``None`` for zero, as tensors."""

    holds_pairs = True
    product_size = 0.0

    def __init__(self, score: Tensor, log_prior: Tensor | None) -> None:
        self._score, self._log_prior = score, log_prior

    @property
    def shape(self) -> torch.Size:
        """``(..., n, m)``, broadcast over score and log-prior."""
        if self._log_prior is None:
            return self._score.shape
        return broadcast(self._score.shape, self._log_prior.shape)

    dtype = property(lambda self: self._score.dtype)
    device = property(lambda self: self._score.device)
    precision = property(lambda self: f"{str(self.dtype).removeprefix('torch.')}, dense")
    resolution = property(lambda self: torch.finfo(self.dtype).eps)
    largest = property(lambda self: max(-self._extremes[0], self._extremes[1]))
    spread = property(lambda self: self._extremes[1] - self._extremes[0])

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """``(score, log_prior)``."""
        return self._score, self._log_prior

    def with_tensors(self, *tensors: Tensor | None) -> DenseAffinity:
        """The affinity of another score and log-prior."""
        score, log_prior = tensors
        assert score is not None
        return DenseAffinity(score, log_prior)

    def with_queries(self, query: Tensor) -> DenseAffinity:
        """The affinity of other rows of scores (..., r, m), with a log-prior of zero."""
        return DenseAffinity(query, None)

    def with_keys(self, key: Tensor) -> DenseAffinity:
        """The affinity of other columns of scores, given as rows (..., r, n)."""
        return DenseAffinity(key.mT, None)

    @property
    def transposed(self) -> DenseAffinity:
        """Transposed views."""
        return DenseAffinity(self._score.mT, None if self._log_prior is None else self._log_prior.mT)

    def soft_c_transform(self, potential: Tensor, epsilon: Number) -> Tensor:
        """See ``Affinity``."""
        if not self._follows(potential, epsilon):
            return softmax_rows(self._score, self._log_prior, potential, epsilon)
        logits, top, top_nats = peaked_logits(self._score, self._log_prior, potential, pairwise(epsilon))
        empty = (logits == -math.inf).all(-1, keepdim=True)  # whose log-sum-exp has no derivative
        nats = torch.where(empty, 0.0, logits).logsumexp(-1, keepdim=True)
        soft_maximum = pairwise(epsilon) * (nats + top_nats) + top
        return torch.where(empty, math.inf, -soft_maximum).squeeze(-1)

    def _follows(self, potential: Tensor, epsilon: Number) -> bool:
        """Whether gradients are followed, so that nothing may be done in place."""
        tensors = (self._score, self._log_prior, potential, epsilon)
        return torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in tensors)

    def weights(self, potential: Tensor, epsilon: Number, index: Rows = slice(None)) -> Tensor:
        """See ``Affinity``."""
        if self._follows(potential, epsilon):
            return super().weights(potential, epsilon, index)
        score, log_prior = self.rows(index)
        out = score.new_empty(softmax_shape(score, log_prior, potential, epsilon))
        softmax_rows(score, log_prior, potential, epsilon, out=out)
        return out

    def exchange(self, epsilon: Number, log_marginal: Tensor, growth: Number) -> Exchange:
        """See ``Affinity``; off a GPU, where numbers may be read back, in scaling form."""
        in_logs = super().exchange(epsilon, log_marginal, growth)
        if self.device.type == "cuda":
            return in_logs
        return Scaling(self._score, self._log_prior, epsilon, log_marginal, growth, in_logs)

    def average(self, potential: Tensor, value: Tensor, epsilon: Number) -> Tensor:
        """See ``Affinity``."""
        logits, _, _ = peaked_logits(self._score, self._log_prior, potential, pairwise(epsilon))
        empty = (logits == -math.inf).all(-1, keepdim=True)  # which averages to zero
        weights = torch.where(empty, 0.0, logits).softmax(-1)
        return product(torch.where(empty, 0.0, weights), value)

    def rows(self, index: Rows) -> tuple[Tensor, Tensor | None]:
        """See ``Affinity``."""
        if isinstance(index, slice) and index == slice(None):
            return self._score, self._log_prior
        return self._score[..., index, :], None if self._log_prior is None else self._log_prior[..., index, :]

    @property
    def forbids(self) -> bool:
        """See ``Affinity``."""
        return self._log_prior is not None and bool((self._log_prior == -math.inf).any())

    def highest(self, potential: Tensor) -> Tensor:
        """See ``Affinity``."""
        if self._log_prior is None:
            return potential.amax(-1, keepdim=True)
        return torch.where(self._log_prior > -math.inf, potential[..., None, :], -math.inf).amax(-1)

    def log_prior_mass(self, kept: Tensor | None = None) -> Tensor:
        """See ``Affinity``."""
        kept = self._score.new_ones(self._score.shape[-1], dtype=torch.bool) if kept is None else kept
        if self._log_prior is None:
            return kept.sum(-1, keepdim=True).to(self.dtype).log()
        return torch.where(kept[..., None, :], self._log_prior, -math.inf).logsumexp(-1)

    @cached_property
    def _extremes(self) -> tuple[float, float]:
        low, high = torch.stack(self._score.detach().aminmax()).tolist()
        return low, high
