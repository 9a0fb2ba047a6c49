"""Sinkhorn's exchange as two products of a matrix and a vector, with potentials absorbed into the matrix."""

# Legend: n queries, m keys; the leading dimensions (...) are a batch.

from __future__ import annotations

import math

import torch
from torch import Tensor

from eotattn.transport.problems.affinity import Exchange, Number, pairwise, sent

__all__ = ["Scaling", "softmax_rows", "softmax_shape"]

#: Entries of one block of rows: what stays in a cache, and for a GPU what fills it.
_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**23}
#: Bits a nat: powers of two take half the time of powers of e, in float64 on a CPU.
_BITS = 1 / math.log(2)


def softmax_rows(
    score: Tensor, log_prior: Tensor | None, potential: Tensor, epsilon: Number, *, out: Tensor | None = None
) -> Tensor:
    """Return the soft c-transform of a potential, (..., n), and write the softmax of the rows to ``out``.

    Without gradients, in place and block by block: a block is read once and stays in the cache. A potential of +inf
    counts as zero.
    """
    *batch, n, m = softmax_shape(score, log_prior, potential, epsilon)
    epsilon = pairwise(epsilon)
    added = potential.nan_to_num(-math.inf, 0.0, -math.inf)[..., None, :]
    size = _BLOCK_ELEMENTS.get(score.device.type, _BLOCK_ELEMENTS["cpu"])
    step = min(n, max(1, size // (math.prod(batch) * m)))
    space = score.new_empty((*batch, step, m)) if out is None else out
    top, total = score.new_empty((2, *batch, n, 1))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        block = space[..., : rows.stop - start, :] if out is None else out[..., rows, :]
        torch.add(score[..., rows, :], added, out=block)
        peak = _peak(block, top[..., rows, :])
        block.sub_(peak).mul_(_BITS / epsilon)
        if log_prior is not None:
            block.add_(log_prior[..., rows, :], alpha=_BITS)
            bits = _peak(block)
            block.sub_(bits)
            peak.add_(epsilon * (bits / _BITS))
        torch.sum(block.exp2_(), -1, keepdim=True, out=total[..., rows, :])
        if out is not None:
            block.div_(total[..., rows, :])
    return torch.neg(top.add_(epsilon * total.log_())).squeeze(-1)


def softmax_shape(score: Tensor, log_prior: Tensor | None, potential: Tensor, epsilon: Number) -> tuple[int, ...]:
    """The shape (..., n, m) of the softmax of rows."""
    shapes = [score.shape[:-2], potential.shape[:-1]]
    shapes += [] if log_prior is None else [log_prior.shape[:-2]]
    shapes += [epsilon.shape[:-1]] if isinstance(epsilon, Tensor) else []
    return (*torch.broadcast_shapes(*shapes), *score.shape[-2:])


def _peak(block: Tensor, out: Tensor | None = None) -> Tensor:
    """The largest entry of each row; the lowest number where there is none."""
    return torch.amax(block, -1, keepdim=True, out=out).clamp_(min=torch.finfo(block.dtype).min)


class Scaling:
    """The exchange in scaling form.

    With W the softmax of the rows at a reference potential and v the exponential of the distance from it in nats, rows
    sum to W v, and keys receive ``v * W^T (sent / (W v))``. The reference follows where the distance would leave the
    range of the dtype. Where a key with mass is offered less than the dtype holds, logs answer instead.

    Source: absorption, Schmitzer 2019.
    """

    def __init__(
        self,
        score: Tensor,
        log_prior: Tensor | None,
        epsilon: Number,
        log_marginal: Tensor,
        growth: Number,
        in_logs: Exchange,
    ) -> None:
        self._score, self._log_prior, self._epsilon = score, log_prior, epsilon
        self._log_marginal, self._growth, self._in_logs = log_marginal, growth, in_logs
        info = torch.finfo(score.dtype)
        self._smallest = info.tiny / info.eps
        self._farthest = -math.log(self._smallest) / 4
        self._reference: Tensor | None = None

    def _absorb(self, potential: Tensor) -> None:
        """Make ``potential`` the reference."""
        if self._reference is None:
            shape = softmax_shape(self._score, self._log_prior, potential, self._epsilon)
            self._weights = self._score.new_empty(shape)
        self._reference, self._live = potential.clone(), potential.isfinite()
        transform = softmax_rows(self._score, self._log_prior, potential, self._epsilon, out=self._weights)
        self._normaliser = -transform / self._epsilon

    def _distance(self, potential: Tensor) -> Tensor:
        assert self._reference is not None
        return torch.where(self._live, (potential - self._reference) / self._epsilon, 0.0)

    def __call__(self, potential: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Affinity.exchange``."""
        if self._reference is None:
            self._absorb(potential)
        distance = self._distance(potential)
        if not float(distance.abs().amax()) < self._farthest:
            self._absorb(potential)
            distance = self._distance(potential)
        factor = distance.exp()
        rows = _times(factor, self._weights.mT)
        normaliser = self._normaliser + rows.log()
        log_rows = sent(self._log_marginal, normaliser, self._growth)
        scale = log_rows.amax(-1, keepdim=True)
        offered = _times((log_rows - scale).exp() / rows, self._weights)
        if bool(((offered < self._smallest) & self._live).any()):
            return self._in_logs(potential)
        return log_rows, offered.log() + distance + scale, normaliser


def _times(vector: Tensor, matrix: Tensor) -> Tensor:
    """Vectors (..., a) times matrices (..., a, b); in this order small batches are several times faster."""
    if matrix.dim() == 2 and vector.dim() == 1:
        return torch.mv(matrix.mT, vector)
    return torch.matmul(vector.unsqueeze(-2), matrix).squeeze(-2)
