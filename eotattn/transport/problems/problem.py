"""The noun that states an entropic transport problem between queries and keys; it validates and stores."""

# Legend: B batch (any leading dimensions), n queries, m keys.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.checks import check_positive
from eotattn.priors import LogPrior
from eotattn.transport.problems.admissibility import (
    check_log_prior,
    check_marginal,
    check_reachability,
    check_score,
    resolved_key_penalty,
)
from eotattn.transport.problems.affinity import Affinity, DenseAffinity
from eotattn.transport.problems.statement import factored_affinity, point_affinity

__all__ = ["TransportProblem"]

_OWNER = "TransportProblem"


@dataclass(frozen=True, eq=False, init=False, repr=False)
class TransportProblem:
    r"""Entropic transport of mass from queries to keys, with a hard, soft or absent constraint on either side.

    The problem is, over couplings P >= 0 of shape (n, m),

    ``min  <P, -score> + epsilon KL(P || R) + query_penalty KL(P 1 || query_marginal)
    + key_penalty KL(P^T 1 || key_marginal)``

    with the reference ``R_ij = query_marginal_i exp(log_prior_ij)`` and ``KL(p || q) = sum p log(p / q) - p + q``.
    The log-prior is taken as given, not normalised: a row constant added to it changes the value, and under a finite
    query penalty the solution too; under an infinite query penalty the solution ignores it. An infinite penalty is a
    constraint. Without a key marginal the keys are free and, with an infinite query penalty, the rows of the solution
    are the attention weights ``softmax(score / epsilon + log_prior)``.

    All tensors share dtype and device, and broadcast over leading batch dimensions. ``from_factors`` and
    ``from_points`` state problems of any size without n x m numbers; they solve alike. A key marginal entry of exactly
    zero removes the key, and receives zero gradient; a query without mass still has a potential and attention weights.

    Args:
        score: Affinities (the negated cost), cost units, shape (..., n, m), finite.
        epsilon: Transport temperature, cost units, positive and finite.
        log_prior: Log-prior in nats, shape (..., n, m) up to broadcasting of the leading dimensions; -inf forbids a
            pair. ``None`` is the all-ones prior (log-prior zero).
        query_marginal: Non-negative masses, shape (..., n); ``None`` is uniform, 1 / n each. Sums to one where
            ``query_penalty`` is infinite, to anything positive where it is finite.
        key_marginal: Non-negative masses, shape (..., m); ``None`` leaves the keys free. The same rule of mass.
        query_penalty: Cost units, in [0, inf].
        key_penalty: Cost units, in (0, inf]; infinite by default with a key marginal, and zero without one.

    Raises:
        TypeError: If a tensor is not float32 or float64, dtypes differ, or a number is not a number.
        ValueError: If a shape, device or value is out of its range, an argument would have no effect, or no coupling
            can satisfy the masks: a query without an admissible key (one with mass, if keys have masses), or, under
            an infinite key penalty, a key with mass that no query with mass may use.

    Example:
        >>> problem = TransportProblem(torch.zeros(2, 5, 7), epsilon=0.5, key_marginal=torch.full((7,), 1 / 7))
        >>> problem
        TransportProblem(batch=(2,), queries=5, keys=7, epsilon=0.5, query_penalty=inf, key_penalty=inf, torch.float32)

    Source: one-sided, Litman 2025, arXiv 2508.08369; prior, Litman and Guo 2026, arXiv 2601.15380, Eq. 5;
    penalties, Chizat et al. 2018; two-sided attention, Sander et al. 2022.
    """

    affinity: Affinity
    epsilon: float
    query_marginal: Tensor
    key_marginal: Tensor | None
    query_penalty: float
    key_penalty: float

    def __init__(
        self,
        score: Tensor,
        *,
        epsilon: float = 1.0,
        log_prior: Tensor | None = None,
        query_marginal: Tensor | None = None,
        key_marginal: Tensor | None = None,
        query_penalty: float = math.inf,
        key_penalty: float | None = None,
    ) -> None:
        check_score(_OWNER, score)
        check_log_prior(_OWNER, log_prior, score)
        affinity = DenseAffinity(score, log_prior)
        self._state(affinity, epsilon, query_marginal, key_marginal, query_penalty, key_penalty)

    @classmethod
    def from_factors(
        cls,
        query: Tensor,
        key: Tensor,
        *,
        epsilon: float,
        prior: LogPrior | None = None,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        key_padding: Tensor | None = None,
        is_causal: bool = False,
        query_marginal: Tensor | None = None,
        key_marginal: Tensor | None = None,
        query_penalty: float = math.inf,
        key_penalty: float | None = None,
    ) -> TransportProblem:
        """State a problem whose score is ``<query_i, key_j>``, unscaled: attention has ``epsilon = sqrt(d)``.

        The kernel runs in the dtype of query and key; potentials and marginals are float64 for float64, else float32.
        So bfloat16 rounds only the content and the lanes of the prior: at n = m = 4096, d = 64 marginal errors reach
        4e-7 of the mass in both (4e-6 in bfloat16 where marginals are soft), while applied values are rounded by the
        kernel, to 3e-7 in float32 and 2e-3 in bfloat16. Certificates are computed in float64 and see all of it.

        Args:
            query: Shape (..., n, d), float32, float64 or bfloat16, finite.
            key: Shape (..., m, d), the same dtype.
            epsilon: Cost units.
            prior: A log-prior with lanes; its heads are the last leading dimension. Its row constants count.
            query_positions: Shape (n,) or (B, n), tokens; 0 to n - 1 by default. With a prior only.
            key_positions: The same for keys.
            key_padding: Booleans, shape (..., m), true where no query may use the key.
            is_causal: Query i may use keys 0 to i; needs n = m.
            query_marginal: As for a dense problem, as are the three that follow.
            key_marginal: Zero entries remove keys.
            query_penalty: Cost units, in [0, inf].
            key_penalty: Cost units, in (0, inf].

        Raises:
            TypeError, ValueError: As a dense problem, and for an argument that would have no effect.
            NotImplementedError: If the prior has no lanes.

        Example:
            >>> TransportProblem.from_factors(torch.zeros(5, 4), torch.zeros(7, 4), epsilon=2.0)
            TransportProblem(batch=(), queries=5, keys=7, epsilon=2, query_penalty=inf, key_penalty=0, torch.float32)

        Source: original.
        """
        affinity = factored_affinity(
            query,
            key,
            prior=prior,
            positions=(query_positions, key_positions),
            key_padding=key_padding,
            is_causal=is_causal,
        )
        problem = object.__new__(cls)
        problem._state(affinity, epsilon, query_marginal, key_marginal, query_penalty, key_penalty)
        return problem

    @classmethod
    def from_points(
        cls,
        query: Tensor,
        key: Tensor,
        *,
        epsilon: float,
        query_marginal: Tensor | None = None,
        key_marginal: Tensor | None = None,
        query_penalty: float = math.inf,
        key_penalty: float | None = None,
    ) -> TransportProblem:
        """State a problem whose cost is the squared Euclidean distance ``|query_i - key_j|^2``, in factored form.

        Float32 and float64 points may lie far from the origin; bfloat16 points are best centred before they are
        rounded.

        Args:
            query: Points, shape (..., n, d), float32, float64 or bfloat16.
            key: Points, shape (..., m, d), the same dtype.
            epsilon: Transport temperature, in units of squared distance.
            query_marginal: As for a dense problem, as are the three that follow.
            key_marginal: Shape (..., m).
            query_penalty: In [0, inf].
            key_penalty: In (0, inf].

        Example:
            >>> TransportProblem.from_points(torch.zeros(1, 2), torch.ones(1, 2), epsilon=1.0).score
            tensor([[-2.]])

        Source: original; the expansion of the square.
        """
        problem = object.__new__(cls)
        problem._state(point_affinity(query, key), epsilon, query_marginal, key_marginal, query_penalty, key_penalty)
        return problem

    def _state(
        self,
        affinity: Affinity,
        epsilon: float,
        query_marginal: Tensor | None,
        key_marginal: Tensor | None,
        query_penalty: float,
        key_penalty: float | None,
    ) -> None:
        """Check what every kind of problem must satisfy, then store it."""
        *_, n, m = affinity.shape
        epsilon = check_positive(_OWNER, "epsilon", epsilon)
        query_penalty = check_positive(_OWNER, "query_penalty", query_penalty, allow_zero=True, allow_inf=True)
        key_penalty = resolved_key_penalty(_OWNER, key_penalty, key_marginal)
        if query_marginal is None:
            query_marginal = torch.full((n,), 1.0 / n, dtype=affinity.dtype, device=affinity.device)
        else:
            hard = math.isinf(query_penalty)
            check_marginal(_OWNER, "query_marginal", query_marginal, affinity, n, sums_to_one=hard)
        if key_marginal is not None:
            check_marginal(_OWNER, "key_marginal", key_marginal, affinity, m, sums_to_one=math.isinf(key_penalty))
        self._store(affinity, epsilon, query_marginal, key_marginal, query_penalty, key_penalty)
        check_reachability(_OWNER, self.batch_shape, affinity, query_marginal, key_marginal, key_penalty)

    def _store(
        self,
        affinity: Affinity,
        epsilon: float,
        query_marginal: Tensor,
        key_marginal: Tensor | None,
        query_penalty: float,
        key_penalty: float,
    ) -> None:
        values = (affinity, epsilon, query_marginal, key_marginal, query_penalty, key_penalty)
        for name, value in zip(self.__dataclass_fields__, values, strict=True):
            object.__setattr__(self, name, value)

    def with_tensors(self, *tensors: Tensor | None) -> TransportProblem:
        """Return the same problem over other tensors of the same shapes, unchecked: for detached or aliased copies.

        Args:
            *tensors: In the order of ``tensors``: for a dense problem the score (..., n, m), the log-prior or
                ``None``, the query marginal (..., n), the key marginal (..., m) or ``None``.

        Returns:
            A problem with this one's epsilon and penalties.

        Example:
            >>> problem = TransportProblem(torch.zeros(2, 3))
            >>> problem.with_tensors(problem.score + 1, None, problem.query_marginal, None).score.sum().item()
            6.0

        Source: original.
        """
        *parts, query_marginal, key_marginal = tensors
        assert query_marginal is not None
        other = object.__new__(TransportProblem)
        affinity = self.affinity.with_tensors(*parts)
        other._store(affinity, self.epsilon, query_marginal, key_marginal, self.query_penalty, self.key_penalty)
        return other

    def detached(self) -> TransportProblem:
        """A new problem over the same numbers, without gradients: what it remembers of them ends with it."""
        return self.with_tensors(*(None if tensor is None else tensor.detach() for tensor in self.tensors))

    def dense(self) -> TransportProblem:
        """The same problem with n x m numbers; itself, if it has them already."""
        if self.affinity.holds_pairs:
            return self
        other = object.__new__(TransportProblem)
        rest = (self.query_marginal, self.key_marginal, self.query_penalty, self.key_penalty)
        other._store(DenseAffinity(self.score, self.log_prior), self.epsilon, *rest)
        return other

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of the affinity, then the query marginal and the key marginal."""
        return *self.affinity.tensors, self.query_marginal, self.key_marginal

    @property
    def requires_grad(self) -> bool:
        """Whether any of the tensors does."""
        return any(tensor is not None and tensor.requires_grad for tensor in self.tensors)

    @property
    def score(self) -> Tensor:
        """The score of every pair, shape (..., n, m), cost units; a factored problem forms it here."""
        return self.affinity.score

    @property
    def log_prior(self) -> Tensor | None:
        """The log-prior of every pair, shape (..., n, m), nats, or ``None``; a factored problem forms it here."""
        return self.affinity.log_prior

    num_queries = property(lambda self: int(self.affinity.shape[-2]), doc="The number n of queries.")
    num_keys = property(lambda self: int(self.affinity.shape[-1]), doc="The number m of keys.")

    @property
    def batch_shape(self) -> torch.Size:
        """The leading dimensions, broadcast over all tensors; empty for one problem."""
        shapes = [self.affinity.shape[:-2], self.query_marginal.shape[:-1]]
        if self.key_marginal is not None:
            shapes.append(self.key_marginal.shape[:-1])
        return torch.broadcast_shapes(*shapes)

    @property
    def is_balanced(self) -> bool:
        """Whether both marginals are constraints, so that the potentials have a free constant."""
        return math.isinf(self.query_penalty) and math.isinf(self.key_penalty)

    def __repr__(self) -> str:
        return (
            f"TransportProblem(batch={tuple(self.batch_shape)}, queries={self.num_queries}, keys={self.num_keys}, "
            f"epsilon={self.epsilon:g}, query_penalty={self.query_penalty:g}, key_penalty={self.key_penalty:g}, "
            f"{self.affinity.dtype})"
        )
