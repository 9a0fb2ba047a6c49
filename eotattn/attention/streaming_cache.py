"""StreamingCache: attention to the first and the most recent tokens, with a certified bound on what the rest weighed.

Legend: B batch, H query heads, Hk key heads, L new tokens, D key width, V value width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from eotattn.attention.attention_sinks import AttentionSinks
from eotattn.attention.dropped_keys import DroppedKeys
from eotattn.attention.functional import prior_attention
from eotattn.checks import check_floating, check_positive, check_positive_int, check_shape, fail, require
from eotattn.priors import LogPrior
from eotattn.priors.base import check_prior

__all__ = ["StreamedAttention", "StreamingCache"]

OWNER = "StreamingCache"
#: A dropped chunk is noted in pieces of the kept tokens over this, so that a prior that decays loses little in each.
PIECES = 8
#: Room for the error of the kernel's log-sum-exp, in roundings of its dtype and of its sums.
ROUNDINGS = 16


class StreamedAttention(NamedTuple):
    """Attention to the kept tokens.

    Args:
        output: (B, H, L, V).
        log_sum_exp: (B, H, L) nats, over kept keys and sinks.
        dropped_mass: (B, H, L) float64, at least the weight that the dropped keys would have had, which is the total
            variation between the weights with and without them. No entry of the output is off by more than this times
            the range of the values.
    """

    output: Tensor
    log_sum_exp: Tensor
    dropped_mass: Tensor


class StreamingCache:
    """Keys and values of the first and the most recent tokens of an endless text, in memory that does not grow.

    Dropped keys leave behind, in ``num_bins`` bins that widen with age, the extent of their columns and of the features
    that the prior has of their positions. From these and the log-sum-exp of what was kept follows, for every query, a
    bound on the weight that was lost. Recency keeps it small, since the prior alone bounds what old keys weigh, and so
    does an explicit sink, whose logit stays in the denominator. For inference; the prior stays as it is.

    Args:
        batch_size: Samples B.
        num_kv_heads: Key heads Hk.
        key_width: Width D of a key.
        value_width: Width V of a value.
        prior: Log-prior on positions, with lanes; ``None`` for none.
        num_first: First tokens that are kept for good.
        num_recent: Most recent tokens that are kept beside those of a call.
        num_bins: Bins that bound the rest; more make the bound tighter.
        dtype: Dtype of keys and values.
        device: Device of the storage.

    Attributes:
        length: Tokens so far, kept or not.

    Source: first and recent tokens, Xiao et al. 2023 (arXiv 2309.17453).

    Example:
        >>> cache = StreamingCache(1, 2, key_width=4, value_width=4, num_first=1, num_recent=2)
        >>> x = torch.zeros(1, 2, 1, 4)
        >>> [round(cache.attend(x, x, x).dropped_mass.max().item(), 2) for _ in range(6)]
        [0.0, 0.0, 0.0, 0.0, 0.2, 0.33]
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        *,
        key_width: int,
        value_width: int,
        prior: LogPrior | None = None,
        num_first: int = 4,
        num_recent: int = 1024,
        num_bins: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"batch_size": batch_size, "num_kv_heads": num_kv_heads, "key_width": key_width}
        sizes |= {"value_width": value_width, "num_recent": num_recent, "num_bins": num_bins}
        for name, size in sizes.items():
            check_positive_int(OWNER, name, size)
        self.num_first = check_positive_int(OWNER, "num_first", num_first, minimum=0)
        if prior is not None:
            check_prior(OWNER, "prior", prior)
            fits = prior.has_lanes and not prior.reads_tokens and prior.num_coordinates == 1
            rule, remedy = "have lanes and read positions of a sequence alone", "Leave out what reads tokens"
            require(fits, OWNER, "prior", rule, type(prior).__name__, remedy)
        self.prior, self.num_recent, self.length = prior, num_recent, 0
        self._keys = torch.zeros(batch_size, num_kv_heads, 0, key_width, dtype=dtype, device=device)
        self._values = torch.zeros(batch_size, num_kv_heads, 0, value_width, dtype=dtype, device=device)
        self._dropped = DroppedKeys(prior, num_bins)

    def __repr__(self) -> str:
        return f"StreamingCache({self._keys.shape[2]} of {self.length} tokens, {self.num_elements} numbers)"

    @property
    def num_elements(self) -> int:
        """Numbers that are stored."""
        return self._keys.numel() + self._values.numel() + self._dropped.num_elements

    @torch.no_grad()
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        sinks: AttentionSinks | Tensor | None = None,
        backend: str = "auto",
    ) -> StreamedAttention:
        """Attend from L new tokens to the kept ones and to each other, causally; then drop what is too old.

        Args:
            query: (B, H, L, D).
            key: (B, Hk, L, D).
            value: (B, Hk, L, V).
            scale: Factor on the inner products, by default 1 / sqrt(D).
            sinks: As in :func:`prior_attention`.
            backend: Likewise.

        Raises:
            ValueError: If the shapes do not fit.
            TypeError: If the dtypes do not fit.
        """
        for name, side, stored in (("key", key, self._keys), ("value", value, self._values)):
            check_floating(OWNER, name, side)
            require(side.dtype == stored.dtype, OWNER, name, f"be {stored.dtype}", side, "Cast it", error=TypeError)
            check_shape(OWNER, name, side, (*stored.shape[:2], key.shape[-2], stored.shape[-1]), "Match the cache")
        if query.shape[-2] != key.shape[-2]:
            fail(OWNER, "query", f"have the {key.shape[-2]} tokens of the key", query, "Pass new tokens alone")
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else check_positive(OWNER, "scale", scale)
        new = range(self.length, self.length + key.shape[2])
        keys, values = (torch.cat(sides, dim=2) for sides in ((self._keys, key), (self._values, value)))
        output, lse = prior_attention(
            query, keys, values, prior=self.prior, query_positions=new, key_positions=self._positions(new.stop, keys),
            is_causal=len(new) > 1, scale=scale, sinks=sinks, return_lse=True, backend=backend,
        )  # fmt: skip
        lost = torch.zeros_like(lse, dtype=torch.float64)
        if self._dropped.counts:
            at = torch.arange(new.start, new.stop, device=lse.device)
            most, sizes = self._dropped.log_sum_exp_bound(query, at, scale)
            rounding = torch.finfo(query.dtype).eps + torch.finfo(lse.dtype).eps * (lse.double().abs() + sizes)
            lost = torch.sigmoid(most - lse.double() + ROUNDINGS * rounding)
        self._keep(keys, values, new.stop)
        return StreamedAttention(output, lse, lost)

    def _positions(self, length: int, keys: Tensor) -> Tensor | range:
        """Positions of the kept tokens and of new ones, ``length`` tokens in all."""
        if keys.shape[2] == length:
            return range(length)
        recent = torch.arange(length - keys.shape[2] + self.num_first, length, device=keys.device)
        return torch.cat([torch.arange(self.num_first, device=keys.device), recent])

    def _keep(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Store the first and the most recent of the tokens attended to; note the keys of the others."""
        first, last = self.num_first, keys.shape[2] - self.num_recent
        self.length = length
        if last <= first:
            self._keys, self._values = keys, values
            return
        at = length - keys.shape[2] + first  # position of the first one that goes
        for piece in keys[:, :, first:last].split(-(-self.num_recent // PIECES), dim=2):
            self._dropped.add(piece, at)
            at += piece.shape[2]
        self._keys, self._values = (
            torch.cat([side[:, :, :first], side[:, :, last:]], dim=2) for side in (keys, values)
        )
