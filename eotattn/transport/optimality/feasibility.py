"""Whether a mask admits two hard marginals at all: a set of keys with more mass than the queries that may use it."""

# Legend: n queries, m keys; the leading dimensions are a batch.

from __future__ import annotations

import math

import torch
from torch import Tensor

from eotattn.transport.problems import TransportProblem

__all__ = ["unplaceable_mass"]


def unplaceable_mass(problem: TransportProblem, level: Tensor) -> Tensor:
    """The mass that no coupling can place, as shown by the level sets of numbers on the keys; shape of the batch.

    For any set of keys, its marginal less that of the queries that may use one of them is mass without a place, by
    Hall's condition; where a mask admits no coupling, the potentials of such a set run off together, so their levels
    show it. One pass over the mask.

    Source: Hall 1935, for flows; Gale 1957.
    """
    assert problem.key_marginal is not None
    batch = problem.batch_shape
    level = torch.where(problem.key_marginal > 0, level, -math.inf).expand(*batch, problem.num_keys)
    reached = problem.affinity.highest(level).expand(*batch, problem.num_queries)
    cuts, order = level.sort(-1, descending=True)
    demand = problem.key_marginal.expand_as(level).gather(-1, order).cumsum(-1)
    heights, rows = reached.sort(-1)
    supply = problem.query_marginal.expand_as(reached).gather(-1, rows)
    below = torch.nn.functional.pad(supply.cumsum(-1), (1, 0))
    first = torch.searchsorted(heights.contiguous(), cuts.contiguous())  # queries from here on may use the set
    offered = supply.sum(-1, keepdim=True) - below.gather(-1, first)
    # Keys at the same level belong to a set together: only its last counts.
    last = torch.nn.functional.pad(cuts[..., 1:] < cuts[..., :-1], (0, 1), value=True)
    return torch.where(last & cuts.isfinite(), demand - offered, 0.0).amax(-1).clamp(min=0)
