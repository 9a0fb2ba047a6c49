"""Sinkhorn's exchange as two products of a matrix and a vector, with potentials absorbed into the matrix."""

# Legend: n queries, m keys; the leading dimensions (...) are a batch.

from __future__ import annotations

import math
from itertools import repeat

import torch
from torch import Tensor

from eotattn.transport.problems.affinity import Exchange, Number, broadcast, pairwise, plus, sent

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
    top, total = score.new_empty((2, *batch, n, 1))
    space = score.new_empty((*batch, step, m)) if out is None else out
    priors = repeat(None) if log_prior is None else log_prior.split(step, -2)
    blocks = repeat(space) if out is None else out.split(step, -2)
    parts = (one.split(step, -2) for one in (score, top, total))
    for rows, peak, mass, nats, block in zip(*parts, priors, blocks, strict=False):
        block = block[..., : rows.shape[-2], :] if out is None else block
        torch.add(rows, added, out=block)
        _peak(block, peak)
        block.sub_(peak).mul_(_BITS / epsilon)
        if nats is not None:
            bits = _peak(block.add_(nats, alpha=_BITS))
            block.sub_(bits)
            peak.add_(epsilon * (bits / _BITS))
        torch.sum(block.exp2_(), -1, keepdim=True, out=mass)
        if out is not None:
            block.div_(mass)
    return torch.neg(top.add_(epsilon * total.log_())).squeeze(-1)


def softmax_shape(score: Tensor, log_prior: Tensor | None, potential: Tensor, epsilon: Number) -> tuple[int, ...]:
    """The shape (..., n, m) of the softmax of rows."""
    shapes = [score.shape[:-2], potential.shape[:-1]]
    shapes += [] if log_prior is None else [log_prior.shape[:-2]]
    shapes += [epsilon.shape[:-1]] if isinstance(epsilon, Tensor) else []
    return (*broadcast(*shapes), *score.shape[-2:])


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

    def iterated(
        self, potential: Tensor, marginal: Tensor, active: Tensor, bounds: tuple[int, int, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Plain iterations between two hard marginals: key potential, number, and whether the dtype held them.

        ``bounds`` are iterations at most, those between two checks, and the error (summed, of the key masses) at which
        a problem stops. An iteration changes keys by target over mass, which tells the error that it began with, and
        that never grows.
        """
        if self._reference is None:
            self._absorb(potential)
        assert self._reference is not None
        *batch, n, m = self._weights.shape
        most, stride, bound = bounds
        weights = self._weights.view(-1, n, m)
        turned = weights.mT
        sends = self._log_marginal.exp().expand(*batch, n).reshape(-1, 1, n)
        removed = (~self._live).to(marginal).expand(*batch, m).reshape(-1, 1, m)  # keys that stay where they are
        wanted = marginal.expand(*batch, m).reshape(-1, 1, m) + removed
        factor = self._distance(potential).expand(*batch, m).reshape(-1, 1, m).exp()
        kept, before, rows = factor.clone(), torch.empty_like(factor), torch.empty_like(sends)
        going = active.expand(batch).reshape(-1, 1, 1)
        count = torch.zeros_like(going, dtype=torch.int64)
        for done in range(0, most, stride):
            steps = min(stride, most - done)
            for _ in range(steps):
                torch.div(sends, torch.bmm(factor, turned, out=rows), out=rows)
                torch.div(wanted, torch.baddbmm(removed, rows, weights, out=before), out=before)
                factor, before = before, factor
            torch.where(going, factor, kept, out=kept)
            count.add_(going, alpha=steps)
            error = before.div_(factor).sub_(1.0).mul_(wanted).abs_().sum(-1, keepdim=True)
            going = going & (error > bound)  # also false for what is no number
            if not bool(going.any()):
                break
        distance = kept.log_().view(*batch, m)
        fine = distance.abs().amax(-1) < self._farthest
        return plus(self._reference, distance, self._epsilon), count.view(batch), fine


def _times(vector: Tensor, matrix: Tensor) -> Tensor:
    """Vectors (..., a) times matrices (..., a, b); in this order small batches are several times faster."""
    return torch.matmul(vector.unsqueeze(-2), matrix).squeeze(-2)
