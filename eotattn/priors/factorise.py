"""Lanes for a prior that states none: a factorisation at given positions, with its rank and a certificate.

Legend: H heads, Q queries, K keys, R rank, L positions.

    log_prior[h, i, j] = query_table[i] . core[h] . key_table[j] + error, both tables orthonormal, shared by all heads
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eotattn.checks import check_positive, check_positive_int, fail, require
from eotattn.priors.base import LogPrior, check_prior
from eotattn.priors.terms import FEATURES, Features, KeyTerm, Term

__all__ = ["Factorisation", "FactorisedPrior", "factorise"]

#: Pairs of a head at most: the dense log-prior is in memory, and the work grows with the cube of the positions.
MOST_PAIRS = 4096**2
#: Lanes at most: a call's plan holds a number for every pair of weights, column and lane.
MOST_LANES = 128


@dataclass(frozen=True)
class Factorisation:
    """Lanes of a prior at some positions, and how exact they are.

    Args:
        prior: The prior with lanes; at other positions it is an error.
        rank: Lanes R in a dtype that needs no splitting.
        error: Largest error over all pairs and heads, evaluated in float64, nats.
        tolerance: What was asked for, nats.
    """

    prior: FactorisedPrior
    rank: int
    error: float
    tolerance: float

    @property
    def total_variation_bound(self) -> float:
        """Largest total variation between attention rows with the prior and with its lanes: tanh(error / 2)."""
        return math.tanh(self.error / 2)

    def __str__(self) -> str:
        bound = self.total_variation_bound
        return f"rank {self.rank}: error {self.error:.1e} nats at most, total variation {bound:.1e} at most"


class FactorisedPrior(LogPrior):
    """What :func:`factorise` returns: a fixed log-prior with lanes at the positions that it was made for.

    Args:
        core: (H, R, R) float64, nats.
        query: (Q positions, their table (Q, R)).
        key: (K positions, their table (K, R)).
        size: Nats that the sizes of all products sum to at most.
    """

    core: Tensor

    def __init__(self, core: Tensor, query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor], size: float) -> None:
        super().__init__(core.shape[0])
        self.num_coordinates = 1 if query[0].dim() == 1 else query[0].shape[-1]
        self.register_buffer("core", core)
        self._tables = {side: _sorted(*given, self.num_coordinates) for side, given in (("query", query), ("key", key))}
        self._size = size
        self._name_features()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._name_features()

    def check_positions(self, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
        """Raise unless both are among the positions that were factorised."""
        super().check_positions(query_positions, key_positions)
        for side, positions in (("query", query_positions), ("key", key_positions)):
            if positions is not None and not torch.compiler.is_compiling():
                known, at = self._tables[side][0].to(positions.device), _coded(positions, self.num_coordinates)
                inside = bool((known[_index(known, at)] == at).all())
                rule, remedy = "be among those that were factorised", "Factorise at all positions of the call"
                require(inside, "FactorisedPrior", f"{side}_positions", rule, positions, remedy)

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The product of the factors, in nats."""
        features = FEATURES[self._features_name]
        query, key = features.query(query_position), features.key(key_position)
        factors = (query.unsqueeze(-2) @ self.core[head]).squeeze(-2)
        return (factors * key).sum(-1).to(query_position.dtype)

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """One term."""
        return (Term(FEATURES[self._features_name], (self.core.flatten(1),)),)

    def _name_features(self) -> None:
        """Features are named by their numbers, so that equal names are equal features in any process."""
        digest = hashlib.sha256()
        for side in ("query", "key"):
            for tensor in self._tables[side]:
                digest.update(tensor.numpy().tobytes())
        rank = self.core.shape[-1]
        self._features_name = f"factors {digest.hexdigest()} of {self._size}"
        if self._features_name not in FEATURES:
            FEATURES[self._features_name] = Features(
                self._features_name,
                _lookup(*self._tables["query"], self.num_coordinates),
                _lookup(*self._tables["key"], self.num_coordinates),
                entries=tuple((f * rank + g, f, g, 1.0) for f in range(rank) for g in range(rank)),
                num_features=(rank, rank),
                typical_range=self._size,
            )


def factorise(
    prior: LogPrior,
    positions: Tensor,
    *,
    tolerance: float,
    key_positions: Tensor | None = None,
    max_rank: int = 64,
) -> Factorisation:
    """Find the fewest lanes that carry a log-prior at given positions within a tolerance; any prior, no training.

    The subspaces are those of the singular vectors of all heads side by side, so that heads share key lanes. The error
    is evaluated at every pair. Learned numbers are read once: factorise again after training.

    Args:
        prior: Any log-prior, finite at these positions.
        positions: (L,) or on grids (L, C), distinct; of queries, and of keys too.
        tolerance: Largest error of any pair, nats.
        key_positions: (K,) or (K, C), distinct, where keys have positions of their own.
        max_rank: Lanes at most, up to 128: what a call prepares once grows with the fourth power of the rank.

    Returns:
        A :class:`Factorisation`; its ``prior`` serves in any attention call at these positions.

    Raises:
        ValueError: If the tolerance needs more lanes, with the rank that it needs; if the log-prior is not finite.

    Source:
        Low-rank biases in lanes: Wu et al. 2025, FlashBias (arXiv 2505.12044); here with a certificate.

    Example:
        >>> from eotattn.priors import KerplePrior
        >>> found = factorise(KerplePrior(8), torch.arange(64, 128), key_positions=torch.arange(64), tolerance=1e-2)
        >>> found.rank < 8, found.error <= 1e-2
        (True, True)
    """
    owner = "factorise"
    check_prior(owner, "prior", prior)
    check_positive(owner, "tolerance", tolerance)
    check_positive_int(owner, "max_rank", max_rank)
    rule, remedy = f"be at most {MOST_LANES}", "Use the dense form of such a prior"
    require(max_rank <= MOST_LANES, owner, "max_rank", rule, max_rank, remedy)
    keys = positions if key_positions is None else key_positions
    for name, side in (("positions", positions), ("key_positions", keys)):
        remedy = "Pass e.g. torch.arange(64)"
        require(isinstance(side, Tensor), owner, name, "be a tensor", side, remedy, error=TypeError)
    prior.check_positions(positions, keys)
    for name, side in (("positions", positions), ("key_positions", keys)):
        row = 1 if prior.num_coordinates == 1 else 2
        distinct = side.dim() == row and len(_coded(side, prior.num_coordinates).unique()) == len(side)
        require(distinct, owner, name, "be one row of distinct positions", side, "Drop what occurs twice")
    pairs = len(positions) * len(keys)
    require(pairs <= MOST_PAIRS, owner, "positions", f"make {MOST_PAIRS} pairs at most", pairs, "Pass fewer")
    with torch.no_grad():
        exact = prior.dense(positions, keys, dtype=torch.float64)
        finite = bool(exact.isfinite().all())
        require(finite, owner, "prior", "be finite at all pairs", type(prior).__name__, "Say what is hidden by a mask")
        bases = _basis(exact), _basis(exact.mT)
        cores = bases[0].mT @ exact @ bases[1]
        rank, error = _fewest(exact, bases, cores, tolerance)
        if rank > max_rank or error > tolerance:
            needs = f"it needs rank {rank}" if error <= tolerance else "no rank reaches it in float64"
            rule = f"be reachable with {max_rank} lanes: {needs}"
            fail(owner, "tolerance", rule, tolerance, "Raise the tolerance or max_rank")
        query_table, key_table, core = bases[0][:, :rank], bases[1][:, :rank], cores[:, :rank, :rank]
        size = float(((query_table @ core).abs() @ key_table.abs().mT).max())
        query, key = (positions.double().cpu(), query_table.cpu()), (keys.double().cpu(), key_table.cpu())
        return Factorisation(FactorisedPrior(core.clone(), query, key, size), rank, error, tolerance)


def _basis(matrix: Tensor) -> Tensor:
    """(L, L) orthonormal columns: what spans most of the columns of all (H, L, M) matrices comes first."""
    gram = (matrix @ matrix.mT).sum(0)
    return torch.linalg.eigh(gram).eigenvectors.flip(-1)


def _fewest(exact: Tensor, bases: tuple[Tensor, Tensor], cores: Tensor, tolerance: float) -> tuple[int, float]:
    """The smallest rank within the tolerance, or the full one, and its error."""

    def error(rank: int) -> float:
        approximate = bases[0][:, :rank] @ cores[:, :rank, :rank] @ bases[1][:, :rank].mT
        return float((approximate - exact).abs().max())

    low, high = 0, 1
    full = min(exact.shape[1:])
    while high < full and error(high) > tolerance:
        low, high = high, min(2 * high, full)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= tolerance else (middle, high)
    return high, error(high)


def _coded(positions: Tensor, num_coordinates: int) -> Tensor:
    """Positions (..., L) or (..., L, C) as one number each, (..., L) float64."""
    at = positions.double()
    if num_coordinates == 1:
        return at
    stride = 2.0 ** (52 // num_coordinates)  # whole coordinates below half of it are told apart
    return sum((at[..., c] * stride**c for c in range(1, num_coordinates)), at[..., 0])


def _sorted(positions: Tensor, table: Tensor, num_coordinates: int) -> tuple[Tensor, Tensor]:
    codes, order = _coded(positions, num_coordinates).sort()
    return codes, table[order]


def _index(known: Tensor, at: Tensor) -> Tensor:
    """Index of each position among those known; of a neighbour for others."""
    return torch.searchsorted(known, at.contiguous()).clamp(max=len(known) - 1)


def _lookup(known: Tensor, table: Tensor, num_coordinates: int) -> Callable[[Tensor], Tensor]:
    def rows(positions: Tensor) -> Tensor:
        at = _coded(positions, num_coordinates)
        return table.to(at.device)[_index(known.to(at.device), at)]

    return rows
