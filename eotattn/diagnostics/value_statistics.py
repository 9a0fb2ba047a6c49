"""What attention does to values, streamed: drains, what heads write, and whether a sink is a no-operation.

Legend: B batch, N sequences, H query heads, Hk key heads, Q queries, K keys, V value width, E model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from eotattn.checks import check_shape
from eotattn.diagnostics.values import BROADCAST_DRAIN, DORMANT, NO_OPERATION_DRAIN, ONE_DIRECTION, SINK_QUERIES
from eotattn.diagnostics.values import value_drain as drain_of

__all__ = ["ValueStatistics"]

OWNER = "ValueStatistics"


@dataclass(frozen=True, eq=False)
class ValueStatistics:
    """What each of N sequences says about values, per head, on the CPU in float64; sequences add up like statistics.

    Attributes:
        drain: (N, H) mean over keys of ||W_O v_j||, units of the residual stream.
        sink_drain: (N, H) ||W_O v_j*|| of the chosen key j*; NaN where a sequence lacks it.
        sink_queries: (N, H) share of queries that give j* at least half their weight.
        stable_rank: (N, H) ||O||_F^2 / ||O||_2^2 of the head's output rows; NaN where they are all zero.
        contribution: (N, H) mean over queries of ||W_O o_i||, what the head adds, units of the residual stream.
        relative_contribution: (N, H) the same over its mean over all heads of the layer.
    """

    drain: Tensor
    sink_drain: Tensor
    sink_queries: Tensor
    stable_rank: Tensor
    contribution: Tensor
    relative_contribution: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        value: Tensor,
        output: Tensor,
        output_weight: Tensor,
        key_mass: Tensor,
        *,
        real: Tensor,
        counted: Tensor,
        key: int = 0,
    ) -> ValueStatistics:
        """Compute them from one attention call over whole sequences, in O((Q + K) V) memory.

        Args:
            value: (B, Hk, K, V).
            output: (B, H, Q, V) of the heads, before the output projection.
            output_weight: (E, H V) of the output projection.
            key_mass: (B, H, Q) weight on the chosen key j*.
            real: (B, K) true at keys that are not padding.
            counted: (B, Q) true at queries that are not padding.
            key: j*, counted from the first key that is not padding.

        Example:
            >>> value, weight = torch.eye(2)[None, None], torch.eye(2)
            >>> half, all_true = torch.full((1, 1, 2), 0.5), torch.ones(1, 2, dtype=torch.bool)
            >>> ValueStatistics.of(value, value, weight, half, real=all_true, counted=all_true).drain
            tensor([[1.]], dtype=torch.float64)
        """
        batch, heads, queries, _ = output.shape
        check_shape(OWNER, "key_mass", key_mass, (batch, heads, queries), "Pass the weights of one key")
        check_shape(OWNER, "real", real, (batch, value.shape[2]), "One entry a key")
        check_shape(OWNER, "counted", counted, (batch, queries), "One entry a query")
        drains = drain_of(value, output_weight).double()
        at = (real.int().argmax(-1) + key)[:, None, None].expand(-1, heads, 1)
        sink = drains.gather(-1, at.clamp(max=value.shape[2] - 1)).squeeze(-1)
        sink = sink.masked_fill(real.sum(-1, keepdim=True) <= key, torch.nan)
        written = _mean(drain_of(output, output_weight), counted)
        found = cls(
            drain=_mean(drains, real),
            sink_drain=sink,
            sink_queries=_mean(key_mass >= 0.5, counted),
            stable_rank=_stable_rank(output, counted),
            contribution=written,
            relative_contribution=written / written.mean(-1, keepdim=True),
        )
        return found._map(lambda values: values.cpu())

    @property
    def relative_drain(self) -> Tensor:
        """(N, H) ||W_O v_j*|| over the mean over keys."""
        return self.sink_drain / self.drain

    @property
    def is_sink(self) -> Tensor:
        """(N, H) whether 90% of the queries give the chosen key at least half their weight."""
        return self.sink_queries >= SINK_QUERIES

    @property
    def is_no_operation(self) -> Tensor:
        """(N, H) whether the sink adds next to nothing to the residual stream."""
        return self.is_sink & (self.relative_drain <= NO_OPERATION_DRAIN)

    @property
    def is_broadcast(self) -> Tensor:
        """(N, H) whether the sink writes one vector to all queries."""
        return self.is_sink & (self.relative_drain >= BROADCAST_DRAIN) & (self.stable_rank <= ONE_DIRECTION)

    @property
    def is_dormant(self) -> Tensor:
        """(N, H) whether the head adds less than a tenth of what the heads of its layer add on average."""
        return self.relative_contribution < DORMANT

    @property
    def num_sequences(self) -> int:
        """N."""
        return self.drain.shape[0]

    def heads(self, index: list[int]) -> ValueStatistics:
        """Only the given heads."""
        return self._map(lambda values: values[:, index])

    def sequences(self, chosen: Tensor) -> ValueStatistics:
        """Only the sequences that an index or boolean mask (N,) chooses."""
        return self._map(lambda values: values[chosen])

    def __add__(self, other: ValueStatistics) -> ValueStatistics:
        """Statistics of the sequences of both, in this order."""
        if not isinstance(other, ValueStatistics):
            return NotImplemented
        names = [field.name for field in fields(self)]
        return ValueStatistics(**{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in names})

    def _map(self, function: Callable[[Tensor], Tensor]) -> ValueStatistics:
        return ValueStatistics(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """(B, H) mean over the last axis of (B, H, L) where (B, L) is true."""
    where = where[:, None].double()
    return (values.double() * where).sum(-1) / where.sum(-1)


def _stable_rank(output: Tensor, counted: Tensor) -> Tensor:
    """From the V x V Gram matrix of the rows that count, so that no decomposition grows with Q."""
    rows = output.double() * counted[:, None, :, None]
    values = torch.linalg.eigvalsh(rows.mT @ rows).clamp(min=0)
    return values.sum(-1) / values[..., -1]
