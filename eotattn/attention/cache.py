"""KeyValueCache: keys and values of earlier tokens, preallocated, with positions and padding of every sample.

Legend: B batch, Hk key heads, S slots, L new tokens, D key width, V value width, W kernel width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention.key_storage import KeyStorage
from eotattn.attention.masks import check_padding_mask
from eotattn.checks import check_floating, check_positive_int, check_same_device, check_shape, fail, require
from eotattn.priors import LogPrior
from eotattn.priors.base import check_prior

__all__ = ["CacheView", "KeyValueCache"]


class CacheView(NamedTuple):
    """A cache as some new tokens will leave it; what they bring themselves is not in the slots yet.

    Args:
        keys: (B, Hk, K, D), the slots filled by then, a view.
        values: (B, Hk, K, V), likewise.
        query_positions: Positions of the new tokens, a ``range`` or (B, L).
        key_positions: Positions of all slots, a ``range`` or (B, K).
        padding: (B, K), true where a slot is padding, or ``None`` while there is none.
    """

    keys: Tensor
    values: Tensor
    query_positions: Tensor | range
    key_positions: Tensor | range
    padding: Tensor | None


class KeyValueCache:
    """Keys and values of one attention layer over the slots filled so far.

    All samples share slots; a sample with fewer tokens has padding in some of them, at any side, and its positions go
    on from its own count. So left padding, right padding and prompts of unequal length are one case.

    With ``prior``, keys are stored with the prior's lanes beside them: a decoding step writes one row and attends to
    views, nothing is copied. Parameters of the prior may change between the steps; lanes are then made again. (What is
    written through ``.data`` is not counted by PyTorch and so not seen.)

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
        step: What the last decoding step looked like, its scale and window, if the next one can do without checks.

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
        self._keys = KeyStorage(prior, (*shape, key_width), dtype=dtype, device=device)
        self._values = torch.zeros(*shape, value_width, dtype=dtype, device=device)
        slots = torch.arange(first_position, first_position + max_length, device=device)
        self._positions = slots.repeat(batch_size, 1)  # those of free slots are what comes if no padding comes
        self._padding = torch.zeros(batch_size, max_length, dtype=torch.bool, device=device)
        self._has_padding = False
        self._widen_values()
        self.step: tuple[tuple[Any, ...], float, int | None] | None = None

    @property
    def keys(self) -> Tensor:
        """(B, Hk, length, D), a view."""
        return self._keys.content[:, :, : self.length]

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

    def has_room(self, count: int) -> bool:
        """Whether ``count`` more tokens fit."""
        return self.length + count <= self.max_length

    def next_positions(self, count: int, padding: Tensor | None = None) -> Tensor | range:
        """Positions that the next ``count`` tokens will have; padding tokens repeat their neighbour's.

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
        return range(self.first_position + self.length, self.first_position + end)

    def after(self, key: Tensor, value: Tensor, padding: Tensor | None = None) -> CacheView:
        """What :meth:`append` would make of the cache; raises what it raises, and writes nothing."""
        self._check_new(key, value)
        count = key.shape[-2]
        new, end = self.next_positions(count, padding), self.length + count
        sides = (self._keys.content[:, :, :end], self._values[:, :, :end, : self.value_width])
        if isinstance(new, range):
            return CacheView(*sides, new, range(self.first_position, new.stop), None)
        marks = self._padding[:, self.length : end] if padding is None else padding
        earlier, marked = self._positions[:, : self.length], self._padding[:, : self.length]
        return CacheView(*sides, new, torch.cat([earlier, new], dim=1), torch.cat([marked, marks], dim=1))

    def append(self, key: Tensor, value: Tensor, padding: Tensor | None = None) -> Tensor | range:
        """Write new tokens into the next slots.

        Args:
            key: (B, Hk, L, D).
            value: (B, Hk, L, V).
            padding: (B, L), true where a token is padding.

        Returns:
            The positions of the new tokens.

        Raises:
            ValueError: If the shapes do not fit or the slots do not suffice.
            TypeError: If the padding is not boolean.
        """
        self._check_new(key, value)
        start, count = self.length, key.shape[-2]
        positions, end = self.next_positions(count, padding), start + count
        self._write(key, value, padding)
        if padding is not None and not isinstance(positions, range):
            self._has_padding, self.step = True, None
            self._padding[:, start:end], self._positions[:, start:end] = padding, positions
            self._expect_no_padding(start)
            self._widen_values()
        return positions

    def operands(self, query: Tensor, prior: LogPrior | None, *, scale: float) -> tuple[Tensor, Tensor, Tensor] | None:
        """What a fused kernel takes for the newest queries: lanes in place, keys and values as views.

        Args:
            query: (B, H, Q, D), of the Q slots filled last.
            prior: Log-prior of the call.
            scale: Factor on the inner products.

        Returns:
            Query (B, H, Q, W), keys (B, Hk, length, W) and values (B, Hk, length, V or wider), or ``None`` where what
            is stored does not serve: another prior, scale or dtype, gradients of the prior, compilation.
        """
        return self._views(query) if self._keys.serves(query, prior, scale) else None

    def operands_after(
        self, query: Tensor, key: Tensor, value: Tensor, prior: LogPrior | None, *, scale: float
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """:meth:`operands` after appending keys and values that were found to fit before, or ``None`` and no change."""
        if not self._keys.serves(query, prior, scale):
            return None
        self._write(key, value, None)
        return self._views(query)

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
        for storage in (self._keys.tensor, self._values):
            storage[:, :, : self.length] = storage[samples, :, : self.length]
        if self._has_padding:
            self._padding[:, : self.length] = self._padding[samples, : self.length]
            self._positions[:, : self.length] = self._positions[samples, : self.length]
            self._expect_no_padding(self.length)

    def _check_new(self, key: Tensor, value: Tensor) -> None:
        for name, side, width in (("key", key, self._keys.content_width), ("value", value, self.value_width)):
            check_floating("KeyValueCache", name, side)
            check_shape("KeyValueCache", name, side, (*self._values.shape[:2], key.shape[-2], width), "Match the cache")

    def _write(self, key: Tensor, value: Tensor, padding: Tensor | None) -> None:
        start, end = self.length, self.length + key.shape[2]
        self._keys.write(start, key, padding)
        self._values[:, :, start:end, : self.value_width] = value.detach()
        self.length = end

    def _views(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lanes = self._keys.lanes(self._slot_positions, self.length - query.shape[2], self.length)
        if lanes.shape[-1] > 0:
            query = torch.cat([query, lanes.expand(-1, query.shape[1], -1, -1)], dim=-1)
        return query, self._keys.tensor[:, :, : self.length], self._values[:, :, : self.length]

    def _slot_positions(self) -> Tensor:
        return self._positions if self._has_padding else self._positions[0]

    def _counts(self, new: Tensor) -> Tensor:
        """(B, L) tokens of each sample before each new one, ``new`` being 1 for a token and 0 for padding."""
        return (self.lengths[:, None] + new.cumsum(dim=1) - 1).clamp(min=0)

    def _expect_no_padding(self, changed: int) -> None:
        """Positions of free slots as they are if no padding comes; lanes from slot ``changed`` on are made again."""
        free = torch.ones_like(self._positions[:, self.length :])
        self._positions[:, self.length :] = self.first_position + self._counts(free)
        self._keys.forget_lanes(changed)

    def _widen_values(self) -> None:
        """On a CPU values as wide as keys with their lanes, zeros behind: the fused kernel there wants equal widths."""
        missing = self._keys.tensor.shape[-1] - self._values.shape[-1]
        if self._values.device.type == "cpu" and missing > 0:
            with torch.inference_mode(False):
                self._values = functional.pad(self._values, (0, missing))
