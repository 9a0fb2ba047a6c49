"""KeyValueCache: keys and values of earlier tokens, preallocated, with positions and padding of every sample.

Legend: B batch, Hk key heads, S slots, L new tokens, D key width, V value width, W kernel width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eotattn.attention.masks import check_padding_mask
from eotattn.attention.slots import make_slots, put
from eotattn.attention.stored_lanes import StoredLanes
from eotattn.checks import check_floating, check_positive_int, check_same_device, check_shape, fail, require
from eotattn.priors import LogPrior
from eotattn.priors.base import check_prior
from eotattn.priors.memory import is_plain

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


class KeyValueCache(StoredLanes):
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
        store: ``torch.int8`` or ``torch.float8_e4m3fn`` to keep content in 8 bits, each row of a head scaled by its
            largest number; lanes stay as they are. A row is off by at most 1/254 (int8) of its largest number, or 1/16
            of each of its numbers. What is attended to is a copy in ``dtype``: memory is saved, not time.

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
        store: torch.dtype | None = None,
    ) -> None:
        sizes = {"batch_size": batch_size, "num_kv_heads": num_kv_heads, "max_length": max_length}
        for name, size in (*sizes.items(), ("key_width", key_width), ("value_width", value_width)):
            check_positive_int("KeyValueCache", name, size)
        if prior is not None:
            check_prior("KeyValueCache", "prior", prior)
            rule, heads = f"have a multiple of {num_kv_heads} heads", prior.num_heads
            require(heads % num_kv_heads == 0, "KeyValueCache", "prior", rule, heads, "Build it for query heads")
        self.max_length, self._length, self.first_position = max_length, 0, first_position
        self.key_width, self.value_width, self.prior = key_width, value_width, prior
        place = torch.empty(0, device=device).device
        self._keys, self._values = (
            make_slots("KeyValueCache", (batch_size, num_kv_heads, max_length, width), dtype, place, store)
            for width in (key_width, value_width)
        )
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
        return f"{type(self).__name__}({sizes}, prior={'none' if self.prior is None else type(self.prior).__name__})"

    @property
    def counts_on_host(self) -> bool:
        """Whether the number of tokens is known on the host."""
        return True

    @property
    def length(self) -> int:
        """Slots filled so far."""
        return self._length

    @property
    def keys(self) -> Tensor:
        """(B, Hk, length, D), a view; of 8 bits a copy."""
        return self._keys.content(self._filled)

    @property
    def values(self) -> Tensor:
        """(B, Hk, length, V), likewise."""
        return self._values.content(self._filled)

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
        put(self._kept, self._last(numbers.shape[2]), numbers.detach())

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
            check_same_device("KeyValueCache", ("the cache", self._padding), key_padding_mask=padding)
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
        sides = (self._keys.content(slice(end)), self._values.content(slice(end)))
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
        return self.fill(self.next_positions(key.shape[-2], padding), key, value, padding, key_bias)

    def fill(
        self,
        positions: Tensor | range,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor | range:
        """:meth:`append` what :meth:`after` has let through, at the positions that it gave."""
        self._expect_bias(0 if key_bias is None else key_bias.shape[1])
        self._write(key, value, key_bias)
        if padding is not None and not isinstance(positions, range):
            new = self._last(key.shape[-2])
            assert isinstance(new, slice)
            self._has_padding = True
            self._padding[:, new], self._positions[:, new] = padding, positions
            self._widen()
            self._expect_no_padding(new.start)
        return positions

    def shows(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these, from :meth:`after`, are views of what is stored now."""
        if not is_plain():
            return False
        stored = (self._keys.address, self._values.address)
        return (keys.data_ptr(), values.data_ptr()) == stored

    def operands(self, call: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """What a fused kernel takes for the queries of an :class:`AttentionCall`, whose keys were filled in last.

        Returns:
            Query (B, H, Q, W), keys (B, Hk, length, W) and values (B, Hk, length, V or wider), the last two as views;
            or ``None`` where what is stored does not serve: another prior, scale or dtype, gradients of the prior.
        """
        if not self._serves(call):
            return None
        query = call.query
        if self._keys.width > self.key_width:
            query = self._beside(query, self._last(query.shape[2]), call.query_gains)
        return query, self._keys.rows(self._filled), self._values.rows(self._filled)

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` slots."""
        check_positive_int("KeyValueCache", "length", length, minimum=0)
        rule = f"be at most the {self.length} slots filled"
        require(length <= self.length, "KeyValueCache", "length", rule, length, "Crop to fewer")
        self._padding[:, length : self.length] = False
        self._set_length(length)
        if self._has_padding:
            self._expect_no_padding(length)

    def reorder(self, samples: Tensor) -> None:
        """Let sample b continue what sample ``samples[b]`` was, as beam search does; ``samples`` is (B,) integer."""
        is_index = isinstance(samples, Tensor) and samples.dtype in (torch.int32, torch.int64)
        remedy = "Pass the sample that each one continues"
        require(is_index, "KeyValueCache", "samples", "be an integer tensor", samples, remedy, error=TypeError)
        check_shape("KeyValueCache", "samples", samples, (self._values.shape[0],), "One index a sample")
        count = self.length
        for slots in (self._keys, self._values):
            slots.reorder(samples, count)
        for numbers in (self._key_bias, self._kept):
            if numbers is not None:
                numbers[:, :, :count] = numbers[samples, :, :count]
        if self._has_padding:
            self._padding[:, :count] = self._padding[samples, :count]
            self._positions[:, :count] = self._positions[samples, :count]
            self._expect_no_padding(count)

    # Where tokens go ------------------------------------------------------------------------------------------------

    @property
    def _filled(self) -> slice:
        """The slots that are attended to."""
        return slice(self.length)

    @property
    def _is_empty(self) -> bool:
        return self.length == 0

    def _last(self, count: int) -> slice | Tensor:
        """The slots of the last ``count`` tokens."""
        return slice(self.length - count, self.length)

    def _set_length(self, length: int) -> None:
        self._length = length

    def _check_new(self, key: Tensor, value: Tensor, key_bias: Tensor | None) -> None:
        batch, heads = self._keys.shape[:2]
        sizes = [(batch, heads, key.shape[-2], width) for width in (self.key_width, self.value_width)]
        plain = key_bias is None and self._key_bias is None and key.is_floating_point() and value.is_floating_point()
        if plain and [tuple(key.shape), tuple(value.shape)] == sizes:  # quick, since every step asks
            return
        for name, side, width in (("key", key, self.key_width), ("value", value, self.value_width)):
            check_floating("KeyValueCache", name, side)
            check_shape("KeyValueCache", name, side, (*self._values.shape[:2], key.shape[-2], width), "Match the cache")
        rule, agree = "be given for every token or for none", (key_bias is None) == (self._key_bias is None)
        require(agree or self._is_empty, "KeyValueCache", "key_bias", rule, key_bias, "Pass that of the new tokens")
        if key_bias is not None:
            check_floating("KeyValueCache", "key_bias", key_bias)
            shape = (batch, None if self._is_empty else self._bias_heads, key.shape[-2])
            check_shape("KeyValueCache", "key_bias", key_bias, shape, "Match the cache")

    def _write(self, key: Tensor, value: Tensor, key_bias: Tensor | None) -> None:
        at = slice(self.length, self.length + key.shape[2])
        self._keys.write(at, key.detach())
        self._values.write(at, value.detach())
        if key_bias is not None and self._key_bias is not None:
            self._key_bias[:, :, at] = key_bias.detach()
            lanes = self._bias_lanes(at, self._key_bias[:, :, at])
            self._keys.beside[:, :, at, self._num_lanes - lanes.shape[-1] : self._num_lanes] = lanes
        self._set_length(at.stop)

    def _expect_bias(self, heads: int) -> None:
        """Let the first tokens decide how many heads their bias has, 0 for none."""
        if heads != self._bias_heads and self._is_empty:
            self._set_bias(heads)

    def _counts(self, new: Tensor) -> Tensor:
        """(B, L) tokens of each sample before each new one, ``new`` being 1 for a token and 0 for padding."""
        return (self.lengths[:, None] + new.cumsum(dim=1) - 1).clamp(min=0)

    def _expect_no_padding(self, changed: int) -> None:
        """Positions of free slots as they are if no padding comes; lanes from slot ``changed`` on are written again."""
        free = torch.ones_like(self._positions[:, self.length :])
        self._positions[:, self.length :] = self.first_position + self._counts(free)
        self._query_table = None
        self._write_lanes(changed)
