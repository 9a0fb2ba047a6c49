"""DroppedKeys: what is kept of keys that a cache gave up, enough to bound what attention to them would have weighed.

Legend: B batch, H query heads, Hk key heads, G query heads of a key head, Q queries, K keys, D key width, N bins, F
features of the prior.

A bin holds consecutive tokens: how many, the smallest and the largest of every column of their keys and of every
feature that the prior has of their positions, and the largest norm of a key. A score is at most what the best corner of
that box has, and at most the product of the norms; a bin weighs at most that many keys with that score. Adjacent bins
are joined where they are old, so that sizes grow with age: a prior that decays loses little by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from eotattn.priors import LogPrior
from eotattn.priors.terms import KeyTerm, Term

__all__ = ["DroppedKeys"]


@dataclass
class DroppedKeys:
    """Bounds on attention to keys that are gone, oldest first.

    Args:
        prior: Log-prior that the keys are attended with; its weights may change, but for tables of keys.
        max_bins: Bins that are kept at most.
    """

    prior: LogPrior | None
    max_bins: int
    counts: list[int] = field(default_factory=list)
    lasts: list[int] = field(default_factory=list)
    bins: list[tuple[Tensor, ...]] = field(default_factory=list)  # low ends, high ends: all joined entry by entry

    @property
    def num_elements(self) -> int:
        """Numbers that are kept."""
        return sum(tensor.numel() for bin_ in self.bins for tensor in bin_)

    def add(self, keys: Tensor, first: int) -> None:
        """Note keys (B, Hk, K, D) of the K tokens from position ``first`` on, which follow those noted before."""
        keys, count = keys.double(), keys.shape[2]
        features, tables = self._of_keys(torch.arange(first, first + count, device=keys.device).double())
        low = (keys.amin(2), features.amin(0))
        self.bins.append((*low, keys.amax(2), features.amax(0), keys.norm(dim=-1).amax(2), tables.amax(1)))
        self.counts.append(count)
        self.lasts.append(first + count - 1)
        while len(self.bins) > self.max_bins:
            self._join()

    def log_sum_exp_bound(self, query: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """At least ln sum_j exp(scale * <query, key_j> + log_prior_j) over all keys noted.

        Args:
            query: (B, H, Q, D).
            positions: (Q,) of the queries.
            scale: Factor on the inner products.

        Returns:
            The bound (B, H, Q), and how large the terms are that a log-prior is the sum of, (H, Q); float64, nats.
        """
        key_low, low, key_high, high, norm, tables = (torch.stack(side) for side in zip(*self.bins, strict=True))
        scaled = (scale * query.double()).unflatten(1, (key_low.shape[2], -1))  # (B, Hk, G, Q, D)
        corner = _corner(scaled.unsqueeze(0), key_low[:, :, :, None], key_high[:, :, :, None])
        content = torch.minimum(corner, scaled.norm(dim=-1) * norm[..., None, None]).flatten(2, 3)  # (N, B, H, Q)
        of_queries = self._of_queries(positions.double(), query.shape[1])
        prior = _corner(of_queries, low[:, None], high[:, None])
        counts = torch.tensor(self.counts, dtype=torch.float64, device=query.device).log()
        of_keys = (counts[:, None] + tables).unsqueeze(-1) + prior  # (N, H, Q)
        sizes = of_queries.abs() @ torch.maximum(low.abs(), high.abs()).amax(0)
        return (content + of_keys.unsqueeze(1)).logsumexp(0), sizes

    def _of_keys(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Features (K, F) of keys, and the sum (1 or H, K) of the tables that are looked up by key."""
        features, tables = positions.new_zeros(len(positions), 1), positions.new_zeros(1, len(positions))
        for term in () if self.prior is None else self.prior.terms():
            if isinstance(term, Term):
                features = torch.cat([features, term.features.key(positions).double()], dim=-1)
            elif isinstance(term, KeyTerm):
                tables = tables + term.bias(positions).detach().double()
        return features, tables

    def _of_queries(self, positions: Tensor, num_heads: int) -> Tensor:
        """(H, Q, F): what the features of a key are multiplied by."""
        terms = [] if self.prior is None else [term for term in self.prior.terms() if isinstance(term, Term)]
        each = [term.features.query(positions).double() @ term.weights.detach().double() for term in terms]
        sides = [positions.new_zeros(num_heads, len(positions), 1), *each]
        return torch.cat(sides, dim=-1)

    def _join(self) -> None:
        """Join the two neighbours that are smallest for their age."""
        newest = self.lasts[-1] + 1
        sizes = [
            (self.counts[at] + self.counts[at + 1]) / (newest - self.lasts[at + 1] + self.counts[at + 1])
            for at in range(len(self.counts) - 1)
        ]
        at = sizes.index(min(sizes))
        pairs = list(zip(self.bins[at], self.bins[at + 1], strict=True))
        joined = [torch.minimum(*pair) for pair in pairs[:2]] + [torch.maximum(*pair) for pair in pairs[2:]]
        self.bins[at : at + 2] = [tuple(joined)]
        self.counts[at : at + 2] = [self.counts[at] + self.counts[at + 1]]
        del self.lasts[at]


def _corner(vectors: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The largest inner product (N, ..., Q) of vectors (..., Q, F) with a point of each box (N, ..., F)."""
    return (vectors.clamp(min=0) @ high.unsqueeze(-1) + vectors.clamp(max=0) @ low.unsqueeze(-1)).squeeze(-1)
