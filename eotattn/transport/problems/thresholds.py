"""The affinity of one-sided problems under Tsallis's divergence: rows answer by a threshold instead of a softmax."""

# Legend: n queries, m keys, r rows; the leading dimensions (...) are a batch; beta = alpha - 1.

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from eotattn.checks import fail, require
from eotattn.transport.arithmetic import product
from eotattn.transport.problems.affinity import Affinity, Number, Rows, pairwise
from eotattn.transport.problems.dense import DenseAffinity
from eotattn.transport.problems.regulariser import Tsallis

__all__ = ["TsallisAffinity", "tsallis_affinity"]

#: Newton steps at most (each row's threshold needs ten or so), and roundings that the last one may make.
_STEPS = 200
_ROUNDINGS = 4
#: Share of the exponents of the dtype that the largest log-prior of a row may use.
_HEADROOM = 0.5


class TsallisAffinity(DenseAffinity):
    """A dense affinity whose rows answer by a threshold instead of a softmax.

    ``soft_c_transform`` is minus epsilon times the threshold, at which the weights of the row sum to one. What the keys
    would answer is not defined here: the problem is one-sided, and ``transposed`` tells of reachability alone.
    """

    def __init__(self, score: Tensor, log_prior: Tensor | None, regulariser: Tsallis) -> None:
        super().__init__(score, log_prior)
        self.regulariser: Tsallis = regulariser

    def with_tensors(self, *tensors: Tensor | None) -> TsallisAffinity:
        """See ``Affinity``."""
        score, log_prior = tensors
        assert score is not None
        return TsallisAffinity(score, log_prior, self.regulariser)

    def with_queries(self, query: Tensor) -> TsallisAffinity:
        """See ``DenseAffinity``."""
        return TsallisAffinity(query, None, self.regulariser)

    def soft_c_transform(self, potential: Tensor, epsilon: Number) -> Tensor:
        """See the class; differentiable, twice."""
        return self._answer(potential, epsilon, slice(None))[0]

    def log_weights(self, potential: Tensor, epsilon: Number, index: Rows = slice(None)) -> Tensor:
        """See ``Affinity``; -inf on keys without weight."""
        _, slope, nats = self._answer(potential, epsilon, index)
        return nats + self.regulariser.log_growth(slope)

    def weights(self, potential: Tensor, epsilon: Number, index: Rows = slice(None)) -> Tensor:
        """See ``Affinity``."""
        return self.log_weights(potential, epsilon, index).exp()

    def average(self, potential: Tensor, value: Tensor, epsilon: Number) -> Tensor:
        """See ``Affinity``."""
        return product(self.weights(potential, epsilon), value)

    def rounding(self, potential: Tensor, epsilon: Number) -> tuple[Tensor, Tensor]:
        """What a weight changes by a unit of slope, and a bound for the rounding of the slope, both (..., n, m)."""
        transform, slope, nats = self._answer(potential, epsilon, slice(None))
        regulariser, digit = self.regulariser, torch.finfo(slope.dtype).eps
        size = self._score.abs() + transform.abs()[..., None] + potential.abs()[..., None, :]
        base = (1 + regulariser.beta * slope).clamp(min=0)
        error = _ROUNDINGS * digit * (size / pairwise(epsilon) + slope.abs() + base)
        touched = base + regulariser.beta * error
        bend = nats.exp() * torch.where(
            1 + regulariser.beta * slope > -error, touched ** ((1 - regulariser.beta) / regulariser.beta), 0.0
        )
        return bend, error

    def _answer(self, potential: Tensor, epsilon: Number, index: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """The transform (..., r); score over epsilon less the threshold, and the log-prior, both (..., r, m)."""
        score, log_prior = self.rows(index)
        epsilon, beta = pairwise(epsilon), self.regulariser.beta
        removed = (potential == -math.inf)[..., None, :]
        value = score + torch.where(potential.isfinite(), potential, 0.0)[..., None, :]
        nats = torch.where(removed, -math.inf, value.new_zeros(()) if log_prior is None else log_prior)
        with torch.no_grad():
            # No weight exceeds one, so every key bounds the threshold from below; at the best bound numbers are small.
            peak = (value / epsilon - torch.expm1(-beta * nats) / beta).argmax(-1, keepdim=True)
            top = value.expand(*peak.shape[:-1], value.shape[-1]).gather(-1, peak)
        logits = (value - top) / epsilon
        logits, nats = torch.broadcast_tensors(logits, nats)
        threshold = _Threshold.apply(logits, nats, self.regulariser)
        transform = -(epsilon * threshold + top).squeeze(-1)
        return transform, logits - threshold, nats


class _Threshold(torch.autograd.Function):
    """The number, (..., r, 1), at which ``exp(nats + log_growth(logits - number))`` sums to one.

    Its derivative in the logits is ``bend / sum(bend)`` with ``bend = weight / (1 + beta slope)``, and in nats
    ``weight / sum(bend)``: the Jacobian of the weights is ``diag(bend) - bend bend^T / sum(bend)``.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, nats: Tensor, regulariser: Tsallis) -> Tensor:
        ctx.regulariser = regulariser
        threshold = _solve(logits, nats, regulariser)
        ctx.save_for_backward(logits, nats, threshold)
        return threshold

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor, None]:
        logits, nats, threshold = ctx.saved_tensors
        weight, bend = _weights(logits - threshold, nats, ctx.regulariser)
        share = cotangents[0] / bend.sum(-1, keepdim=True)
        return share * bend, share * weight, None


def _weights(slope: Tensor, nats: Tensor, regulariser: Tsallis) -> tuple[Tensor, Tensor]:
    """The weights, and their derivatives in the slope."""
    growth = regulariser.log_growth(slope)
    weight = (nats + growth).exp()
    return weight, weight / torch.where(growth > -math.inf, 1 + regulariser.beta * slope, 1.0)


def _solve(logits: Tensor, nats: Tensor, regulariser: Tsallis) -> Tensor:
    """Newton's method on the norm of order 1 / beta of ``[1 + beta (logits - threshold)]_+``, convex, from the left.

    So it climbs to the threshold without a line search, in finitely many steps for alpha = 2, where it removes keys.
    Sums are formed in logs.

    Source: for alpha = 2 and no prior, Michelot 1986.
    """
    beta, digit = regulariser.beta, torch.finfo(logits.dtype).eps
    threshold = (logits - torch.expm1(-beta * nats) / beta).amax(-1, keepdim=True)
    for _ in range(_STEPS):
        slope = logits - threshold
        logs = nats + regulariser.log_growth(slope)
        total = logs.logsumexp(-1, keepdim=True)
        base = torch.where(logs > -math.inf, 1 + beta * slope, 1.0)
        step = -torch.expm1(-beta * total) / (beta * ((logs - total).exp() / base).sum(-1, keepdim=True))
        threshold = threshold + step
        if bool((step.abs() <= _ROUNDINGS * digit * (1 + threshold.abs())).all()):
            break
    return threshold


def tsallis_affinity(owner: str, regulariser: Tsallis, affinity: Affinity, *, one_sided: bool) -> TsallisAffinity:
    """Check and build the affinity of a problem with this regulariser."""
    remedy = "Pass e.g. Tsallis(2.0), or leave it out for the entropy"
    is_one = isinstance(regulariser, Tsallis)
    require(is_one, owner, "regulariser", "be a Tsallis", type(regulariser), remedy, error=TypeError)
    rule = "be left out unless keys are free, the query penalty infinite and pairs at hand"
    remedy = "State score and log_prior of one side only"
    if not one_sided or not affinity.holds_pairs:
        fail(owner, "regulariser", rule, regulariser, remedy, error=NotImplementedError)
    score, log_prior = affinity.score, affinity.log_prior
    if log_prior is not None:
        reach = float(log_prior.detach().amax(-1).abs().max())
        limit = _HEADROOM * math.log(torch.finfo(score.dtype).max) / regulariser.beta
        rule = f"have its largest entry of a row within {limit:.3g} nats of zero for {regulariser}"
        require(reach <= limit, owner, "log_prior", rule, f"{reach:.3g} nats", "Normalise it with log_softmax(-1)")
    return TsallisAffinity(score, log_prior, regulariser)
