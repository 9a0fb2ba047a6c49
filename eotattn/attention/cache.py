"""KeyValueCache: keys and values of earlier tokens, preallocated, with positions and padding of every sample.

Legend: B batch, Hk key heads, L tokens, D key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.checks import check_positive_int, check_shape, require

__all__ = ["KeyValueCache"]


class KeyValueCache:
    """Keys and values of one attention layer over the slots filled so far.

    All samples share slots; a sample with fewer tokens has padding in some of them, at any side, and its positions go
    on from its own count. So left padding, right padding and prompts of unequal length are one case.

    Args:
        batch_size: Samples B.
        num_kv_heads: Key heads Hk.
        max_length: Slots to allocate, tokens.
        key_width: Width D of a key.
        value_width: Width V of a value.
        dtype: Dtype of keys and values.
        device: Device of the storage.

    Attributes:
        length: Slots filled so far.

    Example:
        >>> cache = KeyValueCache(1, 2, max_length=8, key_width=4, value_width=4)
        >>> cache.append(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
        >>> cache.length, cache.keys.shape
        (3, torch.Size([1, 2, 3, 4]))
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        key_width: int,
        value_width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"batch_size": batch_size, "num_kv_heads": num_kv_heads, "max_length": max_length}
        for name, size in (*sizes.items(), ("key_width", key_width), ("value_width", value_width)):
            check_positive_int("KeyValueCache", name, size)
        self.max_length, self.length = max_length, 0
        self._keys = torch.zeros(batch_size, num_kv_heads, max_length, key_width, dtype=dtype, device=device)
        self._values = torch.zeros(batch_size, num_kv_heads, max_length, value_width, dtype=dtype, device=device)
        self._positions = torch.zeros(batch_size, max_length, dtype=torch.int64, device=device)
        self._padding = torch.zeros(batch_size, max_length, dtype=torch.bool, device=device)
        self._has_padding = False

    @property
    def keys(self) -> Tensor:
        """(B, Hk, length, D), a view."""
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """(B, Hk, length, V), a view."""
        return self._values[:, :, : self.length]

    @property
    def positions(self) -> Tensor | range:
        """Positions of the filled slots: a ``range`` while no sample has padding, else (B, length), tokens."""
        return self._positions[:, : self.length] if self._has_padding else range(self.length)

    @property
    def padding(self) -> Tensor | None:
        """(B, length), true where a slot is padding, or ``None`` while there is none."""
        return self._padding[:, : self.length] if self._has_padding else None

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of each sample, padding not counted."""
        return (~self._padding[:, : self.length]).sum(dim=1)

    def next_positions(self, count: int, padding: Tensor | None = None) -> Tensor | range:
        """Positions that the next ``count`` tokens will have; padding tokens repeat their neighbour's.

        Args:
            count: New tokens.
            padding: (B, count), true where a new token is padding.
        """
        if padding is None and not self._has_padding:
            return range(self.length, self.length + count)
        new = torch.ones(self._positions.shape[0], count, dtype=torch.int64, device=self._positions.device)
        new = new if padding is None else (~padding).to(torch.int64)
        return (self.lengths[:, None] + new.cumsum(dim=1) - 1).clamp(min=0)

    def append(self, key: Tensor, value: Tensor, padding: Tensor | None = None) -> None:
        """Write new tokens into the next slots.

        Args:
            key: (B, Hk, L, D).
            value: (B, Hk, L, V).
            padding: (B, L), true where a token is padding.

        Raises:
            ValueError: If the shapes do not fit or the slots do not suffice.
        """
        (batch, heads), count = self._keys.shape[:2], key.shape[-2]
        check_shape("KeyValueCache", "key", key, (batch, heads, count, self._keys.shape[-1]), "Match the cache")
        check_shape("KeyValueCache", "value", value, (batch, heads, count, self._values.shape[-1]), "Match the cache")
        end = self.length + count
        rule = f"leave room in {self.max_length} slots"
        require(end <= self.max_length, "KeyValueCache", "key", rule, f"{end} tokens", "Allocate more or crop")
        positions = self.next_positions(count, padding)
        if padding is not None:
            check_shape("KeyValueCache", "padding", padding, (batch, count), "One entry a token")
            self._padding[:, self.length : end] = padding
            self._has_padding = True
        if isinstance(positions, range):
            positions = torch.arange(positions.start, positions.stop, device=self._positions.device)
        self._positions[:, self.length : end] = positions
        self._keys[:, :, self.length : end] = key.detach()
        self._values[:, :, self.length : end] = value.detach()
        self.length = end

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` slots."""
        check_positive_int("KeyValueCache", "length", length, minimum=0)
        rule = f"be at most the {self.length} slots filled"
        require(length <= self.length, "KeyValueCache", "length", rule, length, "Crop to fewer")
        self._padding[:, length : self.length] = False
        self.length = length

    def reorder(self, samples: Tensor) -> None:
        """Let sample b continue what sample ``samples[b]`` was, as beam search does; ``samples`` is (B,) integer."""
        check_shape("KeyValueCache", "samples", samples, (self._keys.shape[0],), "One index a sample")
        for storage in (self._keys, self._values):
            storage[:, :, : self.length] = storage[samples, :, : self.length]
        for storage in (self._positions, self._padding):
            storage[:, : self.length] = storage[samples, : self.length]
