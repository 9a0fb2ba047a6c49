"""KeyValueCache: keys and values of earlier tokens, preallocated, with positions and padding of every sample.

Legend: B batch, Hk key heads, S slots, L new tokens, D key width, V value width, W kernel width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention.masks import check_padding_mask
from eotattn.attention.token_bias import is_learned, key_bias_term
from eotattn.checks import check_floating, check_positive_int, check_same_device, check_shape, fail, require
from eotattn.kernels import sdpa
from eotattn.kernels.append import append_one
from eotattn.kernels.sdpa import WIDTH_STEP
from eotattn.priors import LogPrior
from eotattn.priors.base import check_prior
from eotattn.priors.lane_plan import LanePlan, LaneRequest, plan_lanes
from eotattn.priors.probing import Span, bits_of
from eotattn.priors.terms import KeyTerm, Term

__all__ = ["CacheView", "KeyValueCache"]


class CacheView(NamedTuple):
    """A cache as some new tokens will leave it; what they bring themselves is not in the slots yet.

    Args:
        keys: (B, Hk, K, D), the slots filled by then, a view.
        values: (B, Hk, K, V), likewise.
        query_positions: Positions of the new tokens, a ``range`` or (B, L).
        key_positions: Positions of all slots, a ``range`` or (B, K).
        padding: (B, K), true where a slot is padding, or ``None`` while there is none.
        key_bias: (B, heads, K) float64, likewise a view, or ``None`` where tokens bring none.
    """

    keys: Tensor
    values: Tensor
    query_positions: Tensor | range
    key_positions: Tensor | range
    padding: Tensor | None
    key_bias: Tensor | None


class KeyValueCache:
    """Keys and values of one attention layer over the slots filled so far.

    All samples share slots; a sample with fewer tokens has padding in some of them, at any side, and its positions go
    on from its own count. So left padding, right padding and prompts of unequal length are one case.

    With ``prior``, keys are stored with the prior's lanes beside them: a decoding step writes one row and attends to
    views, nothing is copied. Those lanes hold features of positions alone; what is learned enters with the queries of
    each step, so parameters of the prior may change between steps. A bias that tokens bring has lanes there too, and is
    kept in float64, as is what a prior keeps of tokens that it read.

    Args:
        batch_size: Samples B.
        num_kv_heads: Key heads Hk.
        max_length: Slots S to allocate, tokens.
        key_width: Width D of a key.
        value_width: Width V of a value.
        prior: Log-prior that the keys will be attended with, at scale 1 / sqrt(D).
        first_position: Position of the first slot, tokens.
        dtype: Dtype of keys and values.
        device: Device of the storage.

    Attributes:
        length: Slots filled so far.

    Example:
        >>> cache = KeyValueCache(1, 2, max_length=8, key_width=4, value_width=4)
        >>> cache.append(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
        range(0, 3)
        >>> cache.length, cache.keys.shape
        (3, torch.Size([1, 2, 3, 4]))
    """

    @torch.inference_mode(False)  # so that no later step is bound to the mode in which the cache was made
    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        key_width: int,
        value_width: int,
        *,
        prior: LogPrior | None = None,
        first_position: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"batch_size": batch_size, "num_kv_heads": num_kv_heads, "max_length": max_length}
        for name, size in (*sizes.items(), ("key_width", key_width), ("value_width", value_width)):
            check_positive_int("KeyValueCache", name, size)
        if prior is not None:
            check_prior("KeyValueCache", "prior", prior)
            rule, heads = f"have a multiple of {num_kv_heads} heads", prior.num_heads
            require(heads % num_kv_heads == 0, "KeyValueCache", "prior", rule, heads, "Build it for query heads")
        self.max_length, self.length, self.first_position = max_length, 0, first_position
        self.value_width, shape = value_width, (batch_size, num_kv_heads, max_length)
        self._keys = torch.zeros(*shape, key_width, dtype=dtype, device=device)
        self.key_width, self.scale, self.prior = key_width, 1 / math.sqrt(key_width), prior
        self._values = torch.zeros(*shape, value_width, dtype=dtype, device=device)
        slots = torch.arange(first_position, first_position + max_length, device=device)
        self._positions = slots.repeat(batch_size, 1)  # those of free slots are what comes if no padding comes
        self._padding = torch.zeros(batch_size, max_length, dtype=torch.bool, device=device)
        self._has_padding = False
        self._key_bias: Tensor | None = None
        self._kept: Tensor | None = None
        self._origin = first_position + max_length // 2
        self._query_table: Tensor | None = None
        self._set_bias(0)

    def __repr__(self) -> str:
        batch, heads = self._keys.shape[:2]
        sizes = f"{self.length} of {self.max_length} slots, {batch} x {heads} heads, {self._keys.dtype}"
        return f"KeyValueCache({sizes}, prior={'none' if self.prior is None else type(self.prior).__name__})"

    @property
    def keys(self) -> Tensor:
        """(B, Hk, length, D), a view."""
        return self._keys[:, :, : self.length, : self.key_width]

    @property
    def values(self) -> Tensor:
        """(B, Hk, length, V), a view."""
        return self._values[:, :, : self.length, : self.value_width]

    @property
    def positions(self) -> Tensor | range:
        """Positions of the filled slots: a ``range`` while no sample has padding, else (B, length), tokens."""
        if self._has_padding:
            return self._positions[:, : self.length]
        return range(self.first_position, self.first_position + self.length)

    @property
    def padding(self) -> Tensor | None:
        """(B, length), true where a slot is padding, or ``None`` while there is none."""
        return self._padding[:, : self.length] if self._has_padding else None

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of each sample, padding not counted."""
        return (~self._padding[:, : self.length]).sum(dim=1)

    @property
    def kept(self) -> Tensor | None:
        """(B, N) float64, what was kept of the last token, or ``None`` in an empty cache."""
        return None if self._kept is None or self.length == 0 else self._kept[:, :, self.length - 1]

    def keep(self, numbers: Tensor) -> None:
        """Keep (B, N, L) numbers of the L tokens that were appended last."""
        check_shape("KeyValueCache", "numbers", numbers, (self._values.shape[0], None, None), "Match the cache")
        if self._kept is None:
            self._kept = self._slots_of(numbers.shape[1])
        self._kept[:, :, self.length - numbers.shape[2] : self.length] = numbers.detach()

    def has_room(self, count: int) -> bool:
        """Whether ``count`` more tokens fit."""
        return self.length + count <= self.max_length

    def next_positions(self, count: int, padding: Tensor | None = None) -> Tensor | range:
        """Positions that the next ``count`` tokens will have; padding repeats its neighbour's. In graphs a tensor.

        Args:
            count: New tokens.
            padding: (B, count), true where a new token is padding.

        Raises:
            ValueError: If the slots do not suffice, or the padding has another shape.
            TypeError: If the padding is not boolean.
        """
        end = self.length + count
        if not self.has_room(count):
            rule = f"leave room in {self.max_length} slots"
            fail("KeyValueCache", "key", rule, f"{end} tokens", "Allocate more or crop")
        if padding is not None:
            check_padding_mask("KeyValueCache", padding, (self._values.shape[0], count), "One entry a token")
            check_same_device("KeyValueCache", ("the cache", self._values), key_padding_mask=padding)
            return self.first_position + self._counts((~padding).to(torch.int64))
        if self._has_padding:
            return self._positions[:, self.length : end]
        if torch.compiler.is_compiling():  # a range would make a graph of every length
            return self._positions[0, self.length : end]
        return range(self.first_position + self.length, self.first_position + end)

    def after(
        self, key: Tensor, value: Tensor, padding: Tensor | None = None, key_bias: Tensor | None = None
    ) -> CacheView:
        """What :meth:`append` would make of the cache; raises what it raises, and writes nothing."""
        self._check_new(key, value, key_bias)
        count = key.shape[-2]
        new, end = self.next_positions(count, padding), self.length + count
        sides = (self._keys[:, :, :end, : self.key_width], self._values[:, :, :end, : self.value_width])
        bias = None
        if key_bias is not None:
            self._expect_bias(key_bias.shape[1])
            bias = None if self._key_bias is None else self._key_bias[:, :, :end]
        if isinstance(new, range):
            return CacheView(*sides, new, range(self.first_position, new.stop), None, bias)
        if new.dim() == 1:
            return CacheView(*sides, new, self._positions[0, :end], None, bias)
        marks = self._padding[:, self.length : end] if padding is None else padding
        earlier, marked = self._positions[:, : self.length], self._padding[:, : self.length]
        return CacheView(*sides, new, torch.cat([earlier, new], dim=1), torch.cat([marked, marks], dim=1), bias)

    def append(
        self, key: Tensor, value: Tensor, padding: Tensor | None = None, key_bias: Tensor | None = None
    ) -> Tensor | range:
        """Write new tokens into the next slots.

        Args:
            key: (B, Hk, L, D).
            value: (B, Hk, L, V).
            padding: (B, L), true where a token is padding.
            key_bias: (B, 1 or Hk or H, L), nats, added to every score of the new keys; for all tokens or for none.

        Returns:
            The positions of the new tokens.

        Raises:
            ValueError: If the shapes do not fit or the slots do not suffice.
            TypeError: If the padding is not boolean.
        """
        self._check_new(key, value, key_bias)
        start, count = self.length, key.shape[-2]
        positions, end = self.next_positions(count, padding), start + count
        self._expect_bias(0 if key_bias is None else key_bias.shape[1])
        self._write(key, value, key_bias)
        if padding is not None and not isinstance(positions, range):
            self._has_padding = True
            self._padding[:, start:end], self._positions[:, start:end] = padding, positions
            self._widen()
            self._expect_no_padding(start)
        return positions

    def operands(self, call: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """What a fused kernel takes for the queries of an :class:`AttentionCall`, whose keys were filled in last.

        Returns:
            Query (B, H, Q, W), keys (B, Hk, length, W) and values (B, Hk, length, V or wider), the last two as views;
            or ``None`` where what is stored does not serve: another prior, scale or dtype, gradients of the prior.
        """
        if not self._serves(call):
            return None
        query, width = call.query, self._keys.shape[-1]
        if width > self.key_width:
            query = self._beside(query, self.length - query.shape[2], call.query_gains)
        return query, self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def stored_plan(self, call: Any) -> tuple[LanePlan, int] | None:
        """The lanes beside the stored keys and the origin that they count from, where they serve the call."""
        return None if self._plan is None or not self._serves(call) else (self._plan, self._origin)

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` slots."""
        check_positive_int("KeyValueCache", "length", length, minimum=0)
        rule = f"be at most the {self.length} slots filled"
        require(length <= self.length, "KeyValueCache", "length", rule, length, "Crop to fewer")
        self._padding[:, length : self.length] = False
        self.length = length
        if self._has_padding:
            self._expect_no_padding(length)

    def reorder(self, samples: Tensor) -> None:
        """Let sample b continue what sample ``samples[b]`` was, as beam search does; ``samples`` is (B,) integer."""
        is_index = isinstance(samples, Tensor) and samples.dtype in (torch.int32, torch.int64)
        remedy = "Pass the sample that each one continues"
        require(is_index, "KeyValueCache", "samples", "be an integer tensor", samples, remedy, error=TypeError)
        check_shape("KeyValueCache", "samples", samples, (self._values.shape[0],), "One index a sample")
        for storage in (self._keys, self._values, self._key_bias, self._kept):
            if storage is None:
                continue
            storage[:, :, : self.length] = storage[samples, :, : self.length]
        if self._has_padding:
            self._padding[:, : self.length] = self._padding[samples, : self.length]
            self._positions[:, : self.length] = self._positions[samples, : self.length]
            self._expect_no_padding(self.length)

    def _check_new(self, key: Tensor, value: Tensor, key_bias: Tensor | None) -> None:
        for name, side, width in (("key", key, self.key_width), ("value", value, self.value_width)):
            check_floating("KeyValueCache", name, side)
            check_shape("KeyValueCache", name, side, (*self._values.shape[:2], key.shape[-2], width), "Match the cache")
        rule, agree = "be given for every token or for none", (key_bias is None) == (self._key_bias is None)
        require(self.length == 0 or agree, "KeyValueCache", "key_bias", rule, key_bias, "Pass that of the new tokens")
        if key_bias is not None:
            heads = self._bias_heads if self.length else None
            check_floating("KeyValueCache", "key_bias", key_bias)
            shape = (self._values.shape[0], heads, key.shape[-2])
            check_shape("KeyValueCache", "key_bias", key_bias, shape, "Match the cache")

    def _write(self, key: Tensor, value: Tensor, key_bias: Tensor | None) -> None:
        start, end = self.length, self.length + key.shape[2]
        self._keys[:, :, start:end, : self.key_width] = key.detach()
        self._values[:, :, start:end, : self.value_width] = value.detach()
        if key_bias is not None and self._key_bias is not None:
            self._key_bias[:, :, start:end] = key_bias.detach()
            self._write_bias_lanes(start, end)
        self.length = end

    def _slots_of(self, count: int) -> Tensor:
        """Room for ``count`` numbers a token, (B, count, S) float64."""
        with torch.inference_mode(False):
            shape = (self._values.shape[0], count, self.max_length)
            return torch.zeros(shape, dtype=torch.float64, device=self._values.device)

    def _counts(self, new: Tensor) -> Tensor:
        """(B, L) tokens of each sample before each new one, ``new`` being 1 for a token and 0 for padding."""
        return (self.lengths[:, None] + new.cumsum(dim=1) - 1).clamp(min=0)

    def _expect_no_padding(self, changed: int) -> None:
        """Positions of free slots as they are if no padding comes; lanes from slot ``changed`` on are written again."""
        free = torch.ones_like(self._positions[:, self.length :])
        self._positions[:, self.length :] = self.first_position + self._counts(free)
        self._query_table = None
        self._write_lanes(changed)

    # Lanes ------------------------------------------------------------------------------------------------------------

    def _expect_bias(self, heads: int) -> None:
        """Let the first tokens decide how many heads their bias has, 0 for none."""
        if self.length == 0 and heads != self._bias_heads:
            self._set_bias(heads)

    def _set_bias(self, heads: int) -> None:
        self._key_bias = self._slots_of(heads) if heads else None
        self._plan = self._plan_lanes()
        self._query_table = None
        self._widen()
        self._write_lanes(0)

    @property
    def _bias_heads(self) -> int:
        return 0 if self._key_bias is None else self._key_bias.shape[1]

    def _terms(self, start: int = 0, end: int | None = None) -> tuple[Term | KeyTerm, ...]:
        """The terms of the log-prior, with the bias of the slots from ``start`` to ``end``."""
        terms = () if self.prior is None else self.prior.terms()
        if self._key_bias is None:
            return terms
        bias = self._key_bias[:, :, start:end]
        return (*terms, key_bias_term(bias, self._num_heads, self._keys.shape[1]))

    @property
    def _num_heads(self) -> int:
        return max(self._bias_heads, self._keys.shape[1]) if self.prior is None else self.prior.num_heads

    def _plan_lanes(self) -> LanePlan | None:
        """The lanes that stored keys have beside their content."""
        prior = self.prior
        if prior is not None and (not prior.has_lanes or prior.num_coordinates > 1):
            return None
        if prior is not None and any(isinstance(term, KeyTerm) for term in prior.terms()):
            return None  # numbers of keys that are learned, and may change
        terms, last = self._terms(), self.first_position + self.max_length
        if not terms:
            return None
        request = LaneRequest(
            num_heads=self._num_heads,
            num_kv_heads=self._keys.shape[1],
            dtype=self._keys.dtype,
            span=Span(bits_of(max(last, -self.first_position)), bits_of(self.max_length // 2)),
            query_scale=1 / self.scale,
            has_fixed_keys=True,
        )
        return plan_lanes(terms, request)

    def _serves(self, call: Any) -> bool:
        """Whether what is stored is right for a call."""
        if call.prior is not self.prior or call.query.dtype != self._keys.dtype or call.masks.key_bias is not None:
            return False
        if self.prior is None and self._plan is None:
            return not self._has_padding or math.isclose(call.scale, self.scale)
        numbers = [] if self.prior is None else self.prior.parameters()
        learns = any(map(is_learned, (call.query_bias, *call.query_gains))) or any(
            is_learned(number) for number in numbers
        )
        return self._plan is not None and math.isclose(call.scale, self.scale) and not learns

    def _widen(self) -> None:
        """Make room for lanes and for the lane that hides padding, and on a CPU for values as wide as keys."""
        beside = (0 if self._plan is None else self._plan.num_lanes) + self._has_padding
        width = self.key_width + beside
        if beside and self._keys.is_cuda:
            width = -(-width // WIDTH_STEP) * WIDTH_STEP
        with torch.inference_mode(False):
            if width > self._keys.shape[-1]:
                self._keys = functional.pad(self._keys, (0, width - self._keys.shape[-1]))
            missing = width - self._values.shape[-1]
            if self._values.device.type == "cpu" and missing > 0:  # the fused kernel there wants equal widths
                self._values = functional.pad(self._values, (0, missing))

    @torch.no_grad()
    def _write_lanes(self, start: int) -> None:
        """Write what stands beside the keys from slot ``start`` on: features of positions, and marks of padding."""
        width, dtype = self.key_width, self._keys.dtype
        if self._plan is not None:
            plan, positions = self._plan, self._slot_positions()[..., start:]
            table = plan.table("key", positions, self._origin)
            lanes = plan.sides(self._terms(), (table, table))[1].lanes(dtype)
            self._keys[:, :, start:, width : width + lanes.shape[-1]] = lanes
            width += plan.num_lanes
        if self._has_padding:
            far = sdpa.far_lane(dtype, scale=self.scale)
            self._keys[:, :, start:, width] = (far * self._padding[:, start:]).to(dtype).unsqueeze(1)

    @torch.no_grad()
    def _write_bias_lanes(self, start: int, end: int) -> None:
        """Write the lanes of the bias of the slots from ``start`` to ``end``."""
        if self._plan is None:
            return
        lanes = self._plan.more_of_keys(self._terms(start, end), self._slot_positions()[..., start:end])
        if lanes is not None:
            last = self.key_width + self._plan.num_lanes
            self._keys[:, :, start:end, last - lanes.shape[-1] : last] = lanes

    def _beside(self, query: Tensor, start: int, gains: Sequence[Tensor | None]) -> Tensor:
        """Queries (B, H, Q, D) of the slots from ``start`` on with their lanes, (B, H, Q, W)."""
        side = far = None
        if self._plan is not None:
            plan = self._plan
            if self._query_table is None:
                self._query_table = plan.table("query", self._slot_positions(), self._origin)
            rows = self._query_table[..., start : start + query.shape[2], :]
            side = plan.with_gains(plan.sides(self._terms(), (rows, rows))[0], gains)
        if self._has_padding:
            mark = torch.ones(1, 1, dtype=torch.bool, device=query.device)
            far = sdpa.padding_lane(mark, query.dtype, scale=self.scale)[0]
        return append_one(query, side, far, width=self._keys.shape[-1])

    def _slot_positions(self) -> Tensor:
        return self._positions if self._has_padding else self._positions[0]
