"""The noun that states an entropic transport problem between queries and keys; it validates and stores."""

# Legend: B batch (any leading dimensions), n queries, m keys.

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eotattn.priors import LogPrior
from eotattn.transport.problems.admissibility import (
    check_log_prior,
    check_number,
    check_reachability,
    check_score,
    checked_marginal,
    resolved_key_penalty,
)
from eotattn.transport.problems.affinity import Affinity, Number, broadcast, is_constraint
from eotattn.transport.problems.dense import DenseAffinity
from eotattn.transport.problems.factored_statement import factored_affinity, point_affinity
from eotattn.transport.problems.regulariser import Tsallis
from eotattn.transport.problems.thresholds import tsallis_affinity

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
    constraint. Without a key marginal the problem is semi-relaxed and, with an infinite query penalty, the rows of the
    solution are the attention weights ``softmax(score / epsilon + log_prior)``.

    Epsilon and penalties are numbers, or tensors of shape (..., 1) with one number a problem of the batch; a tensor of
    penalties is positive and finite. All tensors share dtype and device, and broadcast over leading batch dimensions.
    ``from_factors`` and ``from_points`` state problems of any size without n x m numbers; they solve alike. A key
    marginal entry of exactly zero removes the key, from the values too, and receives zero gradient; a query without
    mass still has a potential and attention weights. A hard marginal that sums to one within the rounding of float32
    only is divided by its sum, and a warning says so.

    Args:
        score: Affinities (the negated cost), cost units, shape (..., n, m), finite; or an ``Affinity``.
        epsilon: Transport temperature, cost units, positive and finite.
        log_prior: Log-prior in nats, shape (..., n, m) up to broadcasting of the leading dimensions; -inf forbids a
            pair. ``None`` is the all-ones prior (log-prior zero).
        query_marginal: Non-negative masses, shape (..., n); ``None`` is uniform, 1 / n each. Sums to one where
            ``query_penalty`` is infinite, to anything positive where it is finite.
        key_marginal: Non-negative masses, shape (..., m); ``None`` leaves them free. The same rule of mass.
        query_penalty: Cost units, in [0, inf].
        key_penalty: Cost units, in (0, inf]; infinite by default with a key marginal, and zero without one.
        regulariser: What takes the place of KL(P || R): ``Tsallis(alpha)``, for dense one-sided problems under an
            infinite query penalty; ``None`` keeps it. A row constant of the log-prior then acts as a temperature.

    Raises:
        TypeError: If a tensor is not float32 or float64, dtypes differ, or a number is not a number.
        ValueError: If a shape, device or value is out of its range, an argument would have no effect, or no coupling
            can satisfy the masks: a query without an admissible key (one with mass, if keys have masses), or, under
            an infinite key penalty, a key with mass that no query with mass may use.
        NotImplementedError: If the regulariser cannot serve the problem.

    Example:
        >>> problem = TransportProblem(torch.zeros(2, 5, 7), epsilon=0.5, key_marginal=torch.full((7,), 1 / 7))
        >>> problem
        TransportProblem(batch=(2,), queries=5, keys=7, epsilon=0.5, query_penalty=inf, key_penalty=inf, torch.float32)

    Source: one-sided, Litman 2025, arXiv 2508.08369; prior, Litman and Guo 2026, arXiv 2601.15380, Eq. 5;
    penalties, Chizat et al. 2018; two-sided attention, Sander et al. 2022.
    """

    affinity: Affinity
    epsilon: Number
    query_marginal: Tensor
    key_marginal: Tensor | None
    query_penalty: Number
    key_penalty: Number

    def __init__(
        self,
        score: Tensor | Affinity,
        *,
        epsilon: Number = 1.0,
        log_prior: Tensor | None = None,
        query_marginal: Tensor | None = None,
        key_marginal: Tensor | None = None,
        query_penalty: Number = math.inf,
        key_penalty: Number | None = None,
        regulariser: Tsallis | None = None,
    ) -> None:
        if isinstance(score, Affinity):
            affinity = score
        else:
            check_score(_OWNER, score)
            check_log_prior(_OWNER, log_prior, score)
            affinity = DenseAffinity(score, log_prior)
        *_, n, m = affinity.shape
        epsilon = check_number(_OWNER, "epsilon", epsilon, affinity)
        query_penalty = check_number(_OWNER, "query_penalty", query_penalty, affinity, allow_zero=True, allow_inf=True)
        if regulariser is not None:
            one_sided = key_marginal is None and is_constraint(query_penalty)
            affinity = tsallis_affinity(_OWNER, regulariser, affinity, one_sided=one_sided)
        key_penalty = resolved_key_penalty(_OWNER, key_penalty, key_marginal, affinity)
        if query_marginal is None:
            query_marginal = torch.full((n,), 1.0 / n, dtype=affinity.dtype, device=affinity.device)
        else:
            hard = is_constraint(query_penalty)
            query_marginal = checked_marginal(_OWNER, "query_marginal", query_marginal, affinity, n, sums_to_one=hard)
        if key_marginal is not None:
            hard = is_constraint(key_penalty)
            key_marginal = checked_marginal(_OWNER, "key_marginal", key_marginal, affinity, m, sums_to_one=hard)
        values = (affinity, epsilon, query_marginal, key_marginal, query_penalty, key_penalty)
        vars(self).update(zip(self.__dataclass_fields__, values, strict=True))
        check_reachability(_OWNER, self.batch_shape, affinity, query_marginal, key_marginal, key_penalty)

    @classmethod
    def from_factors(
        cls,
        query: Tensor,
        key: Tensor,
        *,
        epsilon: Number,
        prior: LogPrior | None = None,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        key_padding: Tensor | None = None,
        is_causal: bool = False,
        query_marginal: Tensor | None = None,
        key_marginal: Tensor | None = None,
        query_penalty: Number = math.inf,
        key_penalty: Number | None = None,
    ) -> TransportProblem:
        """State a problem whose score is ``<query_i, key_j>``, unscaled: attention has ``epsilon = sqrt(d)``.

        The kernel runs in the dtype of query and key; potentials and marginals are float64 for float64, else float32.
        So bfloat16 rounds only the content and the lanes of the prior: at n = m = 4096, d = 64 marginal errors reach
        4e-7 of the mass in both (4e-6 in bfloat16 where marginals are soft), while applied values are rounded by the
        kernel, to 3e-7 in float32 and 2e-3 in bfloat16. Certificates are computed in float64 and see all of it.

        Args:
            query: Shape (..., n, d), float32, float64, bfloat16 or float16, finite; float16 is computed in float32.
            key: Shape (..., m, d), the same dtype.
            epsilon: Cost units; one number for all problems in bfloat16.
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
        """
        affinity = factored_affinity(
            query,
            key,
            prior=prior,
            positions=(query_positions, key_positions),
            key_padding=key_padding,
            is_causal=is_causal,
        )
        return cls(
            affinity,
            epsilon=epsilon,
            query_marginal=query_marginal,
            key_marginal=key_marginal,
            query_penalty=query_penalty,
            key_penalty=key_penalty,
        )

    @classmethod
    def from_points(
        cls,
        query: Tensor,
        key: Tensor,
        *,
        epsilon: Number,
        log_prior: Tensor | None = None,
        query_marginal: Tensor | None = None,
        key_marginal: Tensor | None = None,
        query_penalty: Number = math.inf,
        key_penalty: Number | None = None,
    ) -> TransportProblem:
        """State a problem whose cost is the squared Euclidean distance ``|query_i - key_j|^2``, in factored form.

        Float32 and float64 points may lie far from the origin; bfloat16 points are best centred before they are
        rounded.

        Args:
            query: Points, shape (..., n, d), float32, float64 or bfloat16.
            key: Points, shape (..., m, d), the same dtype.
            epsilon: Transport temperature, in units of squared distance.
            log_prior: Nats, shape (..., 1, m): of the key alone, as is ``key_marginal.log()``, with which the reference
                is the product of the marginals; -inf removes a key. Or shape (..., n, m), by which the problem becomes
                dense. ``None`` is zero.
            query_marginal: As for a dense problem, as are the three that follow.
            key_marginal: Shape (..., m).
            query_penalty: In [0, inf].
            key_penalty: In (0, inf].

        Example:
            >>> TransportProblem.from_points(torch.zeros(1, 2), torch.ones(1, 2), epsilon=1.0).score
            tensor([[-2.]])

        Source: the expansion of the square.
        """
        return cls(
            point_affinity(query, key, log_prior),
            epsilon=epsilon,
            query_marginal=query_marginal,
            key_marginal=key_marginal,
            query_penalty=query_penalty,
            key_penalty=key_penalty,
        )

    def with_tensors(self, *tensors: Tensor | None) -> TransportProblem:
        """The same problem over other tensors of the same shapes, in the order of ``tensors``, unchecked."""
        *parts, query_marginal, key_marginal = tensors
        return self.replaced(
            affinity=self.affinity.with_tensors(*parts), query_marginal=query_marginal, key_marginal=key_marginal
        )

    def replaced(self, **fields: Any) -> TransportProblem:
        """A copy with other fields, unchecked."""
        other = copy.copy(self)
        vars(other).update(fields)
        return other

    def with_leaves(self, *leaves: Tensor | None) -> TransportProblem:
        """The same problem over other ``leaves``, unchecked."""
        *tensors, epsilon, query_penalty, key_penalty = leaves
        numbers = {"epsilon": epsilon, "query_penalty": query_penalty, "key_penalty": key_penalty}
        given = {name: value for name, value in numbers.items() if value is not None}
        return self.with_tensors(*tensors).replaced(**given)

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        """``tensors``, then epsilon and the two penalties where they are tensors: all that can have a gradient."""
        numbers = (self.epsilon, self.query_penalty, self.key_penalty)
        return *self.tensors, *(number if isinstance(number, Tensor) else None for number in numbers)

    def detached(self) -> TransportProblem:
        """A new problem over the same numbers, without gradients: what it remembers of them ends with it."""
        return self.with_leaves(*(None if leaf is None else leaf.detach() for leaf in self.leaves))

    def dense(self) -> TransportProblem:
        """The same problem with n x m numbers; itself, if it has them already."""
        if self.affinity.holds_pairs:
            return self
        return self.replaced(affinity=DenseAffinity(self.score, self.log_prior))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of the affinity, then the query marginal and the key marginal."""
        return *self.affinity.tensors, self.query_marginal, self.key_marginal

    @property
    def requires_grad(self) -> bool:
        """Whether any of the leaves does."""
        return any(leaf is not None and leaf.requires_grad for leaf in self.leaves)

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
        leaves = (self.query_marginal, self.key_marginal, self.epsilon, self.query_penalty, self.key_penalty)
        leads = [leaf.shape[:-1] for leaf in leaves if isinstance(leaf, Tensor)]
        return broadcast(self.affinity.shape[:-2], *leads)

    @property
    def regulariser(self) -> Tsallis | None:
        """What takes the place of the relative entropy, or ``None``."""
        return self.affinity.regulariser

    @property
    def is_semi_relaxed(self) -> bool:
        """Whether the keys are free, so that the solution has a closed form."""
        return self.key_marginal is None

    @property
    def is_balanced(self) -> bool:
        """Whether both marginals are constraints, so that the potentials have a free constant."""
        return is_constraint(self.query_penalty) and is_constraint(self.key_penalty)

    @property
    def coldest(self) -> float:
        """The smallest temperature of the batch, cost units."""
        return float(self.epsilon.detach().min()) if isinstance(self.epsilon, Tensor) else self.epsilon

    def __repr__(self) -> str:
        numbers = ", ".join(
            f"{name}={_described(getattr(self, name))}" for name in ("epsilon", "query_penalty", "key_penalty")
        )
        return (
            f"TransportProblem(batch={tuple(self.batch_shape)}, queries={self.num_queries}, keys={self.num_keys}, "
            f"{numbers}, {'' if self.regulariser is None else f'{self.regulariser}, '}{self.affinity.dtype})"
        )


def _described(number: Number) -> str:
    if isinstance(number, Tensor):
        return f"{float(number.detach().min()):g} to {float(number.detach().max()):g}"
    return f"{number:g}"
