"""The noun that says what every pair is worth, and answers in softmaxes: all that solvers ask of a problem."""

# Legend: n queries, m keys; the leading dimensions (...) are a batch.

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from eotattn.transport.problems.regulariser import Tsallis

__all__ = [
    "Affinity",
    "Exchange",
    "Number",
    "Rows",
    "broadcast",
    "is_absent",
    "is_constraint",
    "pairwise",
    "plus",
    "sent",
]

#: One number for all problems of a batch, or one each as a tensor of shape (..., 1).
Number = float | Tensor
#: Some of the queries: a slice, or whole numbers of shape (r,).
Rows = slice | Tensor
#: See ``Affinity.exchange``.
Exchange = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

#: Entries of one block of rows.
_BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**23}


def broadcast(*shapes: torch.Size) -> torch.Size:
    """``torch.broadcast_shapes``, which takes a hundred times as long, wherever shapes agree or are empty."""
    longest = max(shapes, key=len)
    return longest if all(not shape or shape == longest for shape in shapes) else torch.broadcast_shapes(*shapes)


def is_constraint(penalty: Number) -> bool:
    """Whether a penalty is infinite."""
    return not isinstance(penalty, Tensor) and penalty == math.inf


def is_absent(penalty: Number) -> bool:
    """Whether a penalty is zero."""
    return not isinstance(penalty, Tensor) and penalty == 0


def pairwise(number: Number) -> Number:
    """The number as it broadcasts with pairs (..., n, m); as it is, it broadcasts with vectors (..., n)."""
    return number[..., None] if isinstance(number, Tensor) else number


def plus(base: Tensor, vector: Tensor, factor: Number) -> Tensor:
    """``base + factor * vector`` in one operation."""
    if isinstance(factor, Tensor):
        return torch.addcmul(base, vector, factor)
    return torch.add(base, vector, alpha=factor)


def sent(log_marginal: Tensor, normaliser: Tensor, growth: Number) -> Tensor:
    """Log of what queries send, nats, (..., n): their marginal, and ``growth`` times their normaliser."""
    return log_marginal if is_absent(growth) else plus(log_marginal, normaliser, growth)


class Affinity(ABC):
    r"""The score (cost units) and the log-prior (nats) of every pair, as an operator.

    Solvers, objectives and gradients see a problem through two questions only, and through ``transposed``, the same
    affinity with queries and keys exchanged:

    ``soft_c_transform_i = -epsilon log sum_j exp((score_ij + potential_j) / epsilon + log_prior_ij)`` and
    ``average_i = sum_j softmax_j(the same logits) value_j``.

    A dense affinity answers from its tensors; a factored one by fused attention calls, without n x m numbers. The
    iterations ask ``exchange``, both sides in one, which every query must have a key for: a problem sees to it. A
    potential of -inf removes a key; one of +inf (a key out of everybody's reach) counts as zero.
    """

    #: Whether n x m numbers are at hand, so that assembling a matrix of keys by keys is in keeping.
    holds_pairs: bool
    #: What takes the place of the relative entropy, by which rows are softmaxes; or ``None``.
    regulariser: Tsallis | None = None

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
    def with_queries(self, query: Tensor) -> Affinity:
        """The affinity of other queries with the same keys, stated as the first ones were."""

    @abstractmethod
    def with_keys(self, key: Tensor) -> Affinity:
        """The affinity of other keys with the same queries, with a log-prior of zero."""

    @abstractmethod
    def soft_c_transform(self, potential: Tensor, epsilon: Number) -> Tensor:
        """Soft c-transform of a key potential, cost units, (..., n); +inf for a query without keys. Differentiable."""

    def exchange(self, epsilon: Number, log_marginal: Tensor, growth: Number) -> Exchange:
        """What maps a key potential to logs of what queries send, of what keys receive, and of the rows' normaliser.

        A query sends its marginal (..., n), in nats, and ``growth`` times its normaliser in nats. All are in nats,
        (..., n), (..., m) and (..., n). What does not depend on the potential is prepared here, once.
        """
        transposed = self.transposed

        def both(key_potential: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            transform = self.soft_c_transform(key_potential, epsilon)
            normaliser = -transform / epsilon
            log_rows = sent(log_marginal, normaliser, growth)
            offered = -transposed.soft_c_transform(epsilon * log_rows + transform, epsilon)
            # A key that nobody may use has a potential of +inf and is offered -inf: it receives nothing.
            received = ((offered + key_potential) / epsilon).nan_to_num(-math.inf, math.inf, -math.inf)
            return log_rows, received, normaliser

        return both

    @abstractmethod
    def average(self, potential: Tensor, value: Tensor, epsilon: Number) -> Tensor:
        """Softmax average of values (..., m, v) over the keys, shape (..., n, v). Differentiable."""

    @abstractmethod
    def rows(self, index: Rows) -> tuple[Tensor, Tensor | None]:
        """Score and log-prior (``None`` for zero) of some queries, each broadcastable to (..., r, m)."""

    @property
    @abstractmethod
    def forbids(self) -> bool:
        """Whether some pair may be inadmissible."""

    @abstractmethod
    def highest(self, potential: Tensor) -> Tensor:
        """The largest potential (..., m) among the keys that a query may use, (..., n) or (..., 1) if all alike."""

    def reachable(self, alive: Tensor) -> Tensor:
        """Which keys some query out of ``alive`` (booleans, (..., n)) may use: (..., m), or (..., 1) if all alike."""
        return self.transposed.highest(alive.to(self.dtype)) > 0

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
    @abstractmethod
    def product_size(self) -> float:
        """Mean size of the products that make a score, cost units; zero where scores are given and not computed."""

    @property
    def score(self) -> Tensor:
        """The score of every pair; n x m numbers are formed here if they are not at hand."""
        return self.rows(slice(None))[0]

    @property
    def log_prior(self) -> Tensor | None:
        """The log-prior of every pair, likewise."""
        return self.rows(slice(None))[1]

    def log_weights(self, potential: Tensor, epsilon: Number, index: Rows = slice(None)) -> Tensor:
        """Log of the softmax of some rows, nats, shape (..., r, m); differentiable."""
        logits, _, _ = peaked_logits(*self.rows(index), potential, pairwise(epsilon))
        return logits - logits.logsumexp(-1, keepdim=True)

    def weights(self, potential: Tensor, epsilon: Number, index: Rows = slice(None)) -> Tensor:
        """The softmax of some rows, shape (..., r, m); differentiable."""
        return self.log_weights(potential, epsilon, index).exp()

    def bounded_log_weights(
        self, potential: Tensor, epsilon: Number, index: Rows = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """The same, and a bound for what rounding does to each, nats; zero on forbidden pairs.

        With r the unit roundoff: a sum of score and potential errs by r of itself, its distance from the peak and the
        quotient by 3 r of that distance, nats by 2 r of theirs, the normaliser by the average of all this and by r for
        every level of its sum.
        """
        score, log_prior = self.rows(index)
        epsilon = pairwise(epsilon)
        logits, top, _ = peaked_logits(score, log_prior, potential, epsilon)
        log_weights = logits - logits.logsumexp(-1, keepdim=True)
        added = torch.where(potential.isfinite(), potential, 0.0)[..., None, :]
        value = score + added
        distance = (value - top).abs() / epsilon
        shifted = torch.where(added == 0, 0.0, value.abs() + top.abs()) / epsilon
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
    score: Tensor, log_prior: Tensor | None, potential: Tensor, epsilon: Number
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(score + potential) / epsilon + log_prior`` less the peak of each row, and the two parts of that peak.

    Subtracting the parts before dividing keeps full accuracy where score / epsilon is huge. Shapes: score and
    log-prior (..., r, m), potential (..., m); the logits (..., r, m), and cost units and nats of the peak (..., r, 1).
    """
    removed = (potential == -math.inf)[..., None, :]
    affinity = score + torch.where(potential.isfinite(), potential, 0.0)[..., None, :]
    nats = torch.where(removed, -math.inf, affinity.new_zeros(()) if log_prior is None else log_prior)
    with torch.no_grad():
        merged = affinity / epsilon + nats
        peak = merged.argmax(-1, keepdim=True)
        top = affinity.expand(merged.shape).gather(-1, peak)
        top_nats = nats.expand(merged.shape).gather(-1, peak)
        top_nats = torch.where(top_nats == -math.inf, 0.0, top_nats)
    return (affinity - top) / epsilon + (nats - top_nats), top, top_nats
