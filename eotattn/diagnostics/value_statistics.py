"""What attention does to values, streamed: drains, what heads write, and whether a sink is a no-operation.

Legend: B batch, N sequences, H query heads, Hk key heads, Q queries, K keys, V value width, E model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_shape, require

__all__ = ["ValueStatistics", "value_drain"]

OWNER = "ValueStatistics"

#: A key is a sink if this share of the queries gives it at least half of their weight.
SINK_QUERIES = 0.9
#: A sink whose drain is at most this part of the mean is a no-operation.
NO_OPERATION_DRAIN = 0.2
#: A sink whose drain is at least this part of the mean broadcasts, if the head's output has about one direction:
BROADCAST_DRAIN, ONE_DIRECTION = 0.5, 1.5
#: A head that adds less than this part of its layer's mean is dormant.
DORMANT = 0.1
#: Tokens whose drains are computed at once.
DRAIN_BLOCK = 8192


def value_drain(value: Tensor, output_weight: Tensor) -> Tensor:
    """Compute ||W_O^h v_j||, the size of what a query that attends key j alone gets from head h.

    Args:
        value: (B, Hk, K, V).
        output_weight: (E, H V), the weight of the output projection; Hk divides H.

    Returns:
        (B, H, K) in units of the residual stream; never materialises W_O v.

    Source:
        Value drain: Guo et al. 2024 (arXiv 2410.13835); Gu et al. 2024 (arXiv 2410.10781).

    Example:
        >>> value_drain(torch.ones(1, 1, 1, 2), torch.eye(2))
        tensor([[[1.4142]]])
    """
    check_floating("value_drain", "value", value)
    require(value.dim() == 4, "value_drain", "value", "have shape (B, heads, K, V)", value, "Split the heads first")
    width, kv_heads = value.shape[-1], value.shape[1]
    heads = output_weight.shape[-1] // width
    fits = output_weight.dim() == 2 and heads * width == output_weight.shape[-1] and heads > 0 and heads % kv_heads == 0
    rule = f"have shape (E, multiple of {kv_heads * width})"
    require(fits, "value_drain", "output_weight", rule, output_weight, "Transpose it if it is stored the other way")
    dtype = torch.promote_types(value.dtype, torch.float32)
    by_head = output_weight.to(dtype).unflatten(-1, (heads, width)).movedim(1, 0)  # (H, E, V)
    gram = (by_head.mT @ by_head).unflatten(0, (kv_heads, heads // kv_heads))  # (Hk, G, V, V)
    parts = []
    for block in value.split(DRAIN_BLOCK, dim=2):
        wide = block.to(dtype).unsqueeze(2)
        parts.append(((wide @ gram) * wide).sum(-1).clamp(min=0).sqrt().flatten(1, 2))
    return torch.cat(parts, dim=-1)


@dataclass(frozen=True, eq=False)
class ValueStatistics:
    """What each of N sequences says about values, per head, on the CPU in float64; sequences add up like statistics.

    A key is a sink if 90% of the queries give it at least half their weight. A sink is a no-operation if its drain is
    at most 0.2 of the mean over keys, a broadcast if it is at least 0.5 and the output's stable rank at most 1.5. A
    head is dormant if it adds less than a tenth of its layer's mean. The words are those of Guo et al. 2024 (arXiv
    2410.13835), the thresholds conventions.

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
        drains = value_drain(value, output_weight).double()
        at = (real.int().argmax(-1) + key)[:, None, None].expand(-1, heads, 1)
        sink = drains.gather(-1, at.clamp(max=value.shape[2] - 1)).squeeze(-1)
        sink = sink.masked_fill(real.sum(-1, keepdim=True) <= key, torch.nan)
        written = _mean(value_drain(output, output_weight), counted)
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
