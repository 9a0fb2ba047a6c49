"""One transport problem as NumPy arrays, reduced to what carries mass and shifted to where doubles are accurate."""

# Legend: n queries and m keys of the problem; n' and m' those that remain.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from eotattn.transport.problems import TransportProblem

__all__ = ["ReducedProblem", "reduce_problem"]


@dataclass(frozen=True, eq=False)
class ReducedProblem:
    """What ``reduce_problem`` returns, float64."""

    cost: np.ndarray  # cost units, (n', m'): zero at the peak of each row, and on forbidden pairs
    prior: np.ndarray  # (n', m'): one at the peak of each row, zero on forbidden pairs
    lift: np.ndarray  # what the shift took from score + epsilon * log_prior, cost units, (n',)
    rows: np.ndarray  # which queries remain, (n,)
    columns: np.ndarray  # which keys remain, (m,)
    query_marginal: np.ndarray  # (n',), positive
    key_marginal: np.ndarray  # (m',), positive; ones for free keys

    def restore(self, plan: np.ndarray) -> np.ndarray:
        """Return the plan with zeros where rows and columns were dropped, shape (n, m)."""
        full = np.zeros((self.rows.size, self.columns.size))
        full[np.ix_(self.rows, self.columns)] = plan
        return full

    def keep_columns(self, kept: np.ndarray) -> ReducedProblem:
        """Return the problem with some of the remaining keys dropped; ``kept`` are booleans of shape (m',)."""
        columns = self.columns.copy()
        columns[columns] = kept
        cost, prior, key_marginal = self.cost[:, kept], self.prior[:, kept], self.key_marginal[kept]
        return ReducedProblem(cost, prior, self.lift, self.rows, columns, self.query_marginal, key_marginal)


def reduce_problem(problem: TransportProblem, key_marginal: Tensor | None = None) -> ReducedProblem:
    """Drop what carries nothing, and shift the peak of every row to cost zero and prior one.

    The shift changes no attention weights. Where a query penalty is zero it would change the mass, and is left out.
    """
    if problem.regulariser is not None:
        raise NotImplementedError(f"pot: no call of POT serves this regulariser around a prior; got {problem}.")
    score, log_prior, query, key = (None if x is None else x.detach().cpu().double().numpy() for x in problem.tensors)
    key = key if key_marginal is None else key_marginal.detach().cpu().double().numpy()
    assert score is not None
    assert query is not None
    nats = np.zeros_like(score) if log_prior is None else log_prior
    rows = query > 0
    columns = np.isfinite(nats[rows]).any(0) & (True if key is None else key > 0)
    score, nats, query = score[rows][:, columns], nats[rows][:, columns], query[rows]
    key = np.ones(score.shape[1]) if key is None else key[columns]
    lift = np.zeros(len(query))
    if problem.query_penalty > 0:
        peak = (score / problem.epsilon + nats).argmax(1)[:, None]
        top, top_nats = np.take_along_axis(score, peak, 1), np.take_along_axis(nats, peak, 1)
        score, nats, lift = score - top, nats - top_nats, (top + problem.epsilon * top_nats)[:, 0]
    cost = np.where(np.isfinite(nats), 0.0 - score, 0.0)
    return ReducedProblem(cost, np.exp(nats), lift, rows, columns, query, key)
