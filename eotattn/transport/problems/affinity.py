"""The noun that says what every pair is worth, and answers in softmaxes: all that solvers ask of a problem."""

# Legend: n queries, m keys; the leading dimensions (...) are a batch. A price is a potential of the other side.

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from eotattn.transport.arithmetic import product

__all__ = ["Affinity", "DenseAffinity", "Exchange", "Rows"]

#: Some of the queries: a slice, or whole numbers of shape (r,).
Rows = slice | Tensor
#: See ``Affinity.exchange``.
Exchange = Callable[[Tensor], tuple[Tensor, Tensor]]

#: Entries of one block of rows.
_BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**23}


class Affinity(ABC):
    r"""The score (cost units) and the log-prior (nats) of every pair, as an operator.

    Solvers, objectives and gradients see a problem through two questions only, and through ``transposed``, the same
    affinity with queries and keys exchanged:

    ``soft_maximum_i = epsilon log sum_j exp((score_ij + price_j) / epsilon + log_prior_ij)`` and
    ``average_i = sum_j softmax_j(the same logits) value_j``.

    A dense affinity answers from its tensors; a factored one by fused attention calls, without n x m numbers. The
    iterations ask ``exchange``, two soft maxima in one, which every query must have a key for: a problem sees to it. A
    price of -inf removes a key; one of +inf (a key out of everybody's reach) counts as zero.
    """

    #: Whether n x m numbers are at hand, so that assembling a matrix of keys by keys is in keeping.
    holds_pairs: bool

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """``(..., n, m)``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of potentials and marginals: float32 or float64."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the tensors live."""

    @property
    @abstractmethod
    def precision(self) -> str:
        """In which arithmetic the questions are answered, in words."""

    @property
    @abstractmethod
    def resolution(self) -> float:
        """Machine epsilon of the numbers that averages are made of."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the affinity is made of, in the order of ``with_tensors``."""

    @abstractmethod
    def with_tensors(self, *tensors: Tensor | None) -> Affinity:
        """The same affinity over other tensors of the same shapes, unchecked."""

    @property
    @abstractmethod
    def transposed(self) -> Affinity:
        """Queries and keys exchanged."""

    @abstractmethod
    def soft_maximum(self, price: Tensor, epsilon: float) -> Tensor:
        """Soft maximum over the keys, cost units, shape (..., n); -inf for a query without keys. Differentiable."""

    def exchange(self, epsilon: float, log_marginal: Tensor, growth: float) -> Exchange:
        """From a key potential to the log of what queries send and of what keys receive, nats, (..., n) and (..., m).

        A query sends its marginal (..., n), in nats, and ``growth`` times its soft maximum in nats. What does not
        depend on the potential is prepared here, once.
        """
        transposed = self.transposed

        def both(key_potential: Tensor) -> tuple[Tensor, Tensor]:
            answer = self.soft_maximum(key_potential, epsilon)
            log_rows = log_marginal if growth == 0 else torch.add(log_marginal, answer, alpha=growth / epsilon)
            offered = transposed.soft_maximum(epsilon * log_rows - answer, epsilon)
            # A key that nobody may use has a potential of +inf and is offered -inf: it receives nothing.
            return log_rows, ((offered + key_potential) / epsilon).nan_to_num(-math.inf, math.inf, -math.inf)

        return both

    @abstractmethod
    def average(self, price: Tensor, value: Tensor, epsilon: float) -> Tensor:
        """Softmax average of values (..., m, v) over the keys, shape (..., n, v). Differentiable."""

    @abstractmethod
    def rows(self, index: Rows) -> tuple[Tensor, Tensor | None]:
        """Score and log-prior (``None`` for zero) of some queries, each broadcastable to (..., r, m)."""

    @abstractmethod
    def reachable(self, alive: Tensor) -> Tensor:
        """Which keys some query out of ``alive`` (booleans, (..., n)) may use: (..., m), or (..., 1) if all alike."""

    @abstractmethod
    def log_prior_mass(self, kept: Tensor | None = None) -> Tensor:
        """Log of the sum of ``exp(log_prior_ij)`` over the keys in ``kept`` (booleans, (..., m)), nats, as (..., n)."""

    @property
    @abstractmethod
    def largest(self) -> float:
        """A bound for the size of every score, cost units."""

    @property
    @abstractmethod
    def spread(self) -> float:
        """A bound for the range of the scores, cost units."""

    @property
    def score(self) -> Tensor:
        """The score of every pair; n x m numbers are formed here if they are not at hand."""
        return self.rows(slice(None))[0]

    @property
    def log_prior(self) -> Tensor | None:
        """The log-prior of every pair, likewise."""
        return self.rows(slice(None))[1]

    def log_weights(self, price: Tensor, epsilon: float, index: Rows = slice(None)) -> Tensor:
        """Log of the softmax of some rows, nats, shape (..., r, m); differentiable."""
        logits, _, _ = peaked_logits(*self.rows(index), price, epsilon)
        return logits - logits.logsumexp(-1, keepdim=True)

    def bounded_log_weights(self, price: Tensor, epsilon: float, index: Rows = slice(None)) -> tuple[Tensor, Tensor]:
        """The same, and a bound for what rounding does to each, nats; zero on forbidden pairs.

        With r the unit roundoff: a sum of score and price errs by r of itself, its distance from the peak and the
        quotient by 3 r of that distance, nats by 2 r of theirs, the normaliser by the average of all this and by r for
        every level of its sum.
        """
        score, log_prior = self.rows(index)
        logits, top, _ = peaked_logits(score, log_prior, price, epsilon)
        log_weights = logits - logits.logsumexp(-1, keepdim=True)
        priced = torch.where(price.isfinite(), price, 0.0)[..., None, :]
        value = score + priced
        distance = (value - top).abs() / epsilon
        shifted = torch.where(priced == 0, 0.0, value.abs() + top.abs()) / epsilon
        nats = (logits + (top - value) / epsilon).abs()
        error = torch.where(logits > -math.inf, shifted + 3 * distance + 2 * nats + log_weights.abs(), 0.0)
        average = (log_weights.exp() * error).sum(-1, keepdim=True) + 8 + math.log2(logits.shape[-1])
        bound = 0.5 * torch.finfo(logits.dtype).eps * (error + average)
        return log_weights, torch.where(logits > -math.inf, bound, 0.0)

    def blocks(self) -> Iterator[slice]:
        """Spans of queries whose rows fit the memory set aside for certificates."""
        *batch, n, m = self.shape
        size = _BLOCK_ELEMENTS.get(self.device.type, _BLOCK_ELEMENTS["cpu"])
        step = max(1, size // (math.prod(batch) * m))
        yield from (slice(start, min(start + step, n)) for start in range(0, n, step))


def peaked_logits(
    score: Tensor, log_prior: Tensor | None, price: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(score + price) / epsilon + log_prior`` less the peak of each row, and the two parts of that peak.

    Subtracting the parts before dividing keeps full accuracy where score / epsilon is huge.

    Args:
        score: Shape (..., r, m), cost units.
        log_prior: Shape (..., r, m), nats, or ``None``.
        price: Shape (..., m), cost units.
        epsilon: Temperature, cost units.

    Returns:
        ``(logits, top, top_nats)``: nats (..., r, m), cost units (..., r, 1), nats (..., r, 1).

    Example:
        >>> peaked_logits(torch.tensor([[0.0, 2.0]]), None, torch.zeros(2), 0.5)[:2]
        (tensor([[-4., 0.]]), tensor([[2.]]))

    Source: original.
    """
    removed = (price == -math.inf)[..., None, :]
    affinity = score + torch.where(price.isfinite(), price, 0.0)[..., None, :]
    nats = torch.where(removed, -math.inf, affinity.new_zeros(()) if log_prior is None else log_prior)
    with torch.no_grad():
        merged = affinity / epsilon + nats
        peak = merged.argmax(-1, keepdim=True)
        top = affinity.expand(merged.shape).gather(-1, peak)
        top_nats = nats.expand(merged.shape).gather(-1, peak)
        top_nats = torch.where(top_nats == -math.inf, 0.0, top_nats)
    return (affinity - top) / epsilon + (nats - top_nats), top, top_nats


class DenseAffinity(Affinity):
    """Score and log-prior as tensors.

    Args:
        score: Shape (..., n, m), cost units.
        log_prior: Shape (..., n, m), nats, or ``None`` for zero.

    Example:
        >>> DenseAffinity(torch.tensor([[0.0, 0.0]]), None).soft_maximum(torch.zeros(2), 1.0)
        tensor([0.6931])

    Source: original.
    """

    holds_pairs = True

    def __init__(self, score: Tensor, log_prior: Tensor | None) -> None:
        self._score, self._log_prior = score, log_prior

    @property
    def shape(self) -> torch.Size:
        """``(..., n, m)``, broadcast over score and log-prior."""
        return self._score.shape if self._log_prior is None else torch.broadcast_shapes(*self._pair_shapes())

    def _pair_shapes(self) -> tuple[torch.Size, torch.Size]:
        assert self._log_prior is not None
        return self._score.shape, self._log_prior.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the score."""
        return self._score.dtype

    @property
    def device(self) -> torch.device:
        """Of the score."""
        return self._score.device

    @property
    def precision(self) -> str:
        """The dtype of the score."""
        return f"{str(self.dtype).removeprefix('torch.')}, dense"

    @property
    def resolution(self) -> float:
        """Of the dtype of the score."""
        return torch.finfo(self.dtype).eps

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """``(score, log_prior)``."""
        return self._score, self._log_prior

    def with_tensors(self, *tensors: Tensor | None) -> DenseAffinity:
        """The affinity of another score and log-prior."""
        score, log_prior = tensors
        assert score is not None
        return DenseAffinity(score, log_prior)

    @property
    def transposed(self) -> DenseAffinity:
        """Transposed views."""
        return DenseAffinity(self._score.mT, None if self._log_prior is None else self._log_prior.mT)

    def soft_maximum(self, price: Tensor, epsilon: float) -> Tensor:
        """See ``Affinity``."""
        logits, top, top_nats = peaked_logits(self._score, self._log_prior, price, epsilon)
        empty = (logits == -math.inf).all(-1, keepdim=True)  # whose log-sum-exp has no derivative
        nats = torch.where(empty, 0.0, logits).logsumexp(-1, keepdim=True)
        return torch.where(empty, -math.inf, epsilon * (nats + top_nats) + top).squeeze(-1)

    def average(self, price: Tensor, value: Tensor, epsilon: float) -> Tensor:
        """See ``Affinity``."""
        logits, _, _ = peaked_logits(self._score, self._log_prior, price, epsilon)
        empty = (logits == -math.inf).all(-1, keepdim=True)  # which averages to zero
        weights = torch.where(empty, 0.0, logits).softmax(-1)
        return product(torch.where(empty, 0.0, weights), value)

    def rows(self, index: Rows) -> tuple[Tensor, Tensor | None]:
        """See ``Affinity``."""
        if isinstance(index, slice) and index == slice(None):
            return self._score, self._log_prior
        return self._score[..., index, :], None if self._log_prior is None else self._log_prior[..., index, :]

    @property
    def score(self) -> Tensor:
        """The tensor that was given."""
        return self._score

    @property
    def log_prior(self) -> Tensor | None:
        """The tensor that was given."""
        return self._log_prior

    def reachable(self, alive: Tensor) -> Tensor:
        """See ``Affinity``."""
        if self._log_prior is None:
            return alive.any(-1, keepdim=True)
        return ((self._log_prior > -math.inf) & alive[..., None]).any(-2)

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

    @property
    def largest(self) -> float:
        """The largest size of a score."""
        low, high = self._extremes
        return max(-low, high)

    @property
    def spread(self) -> float:
        """The range of the scores."""
        low, high = self._extremes
        return high - low
