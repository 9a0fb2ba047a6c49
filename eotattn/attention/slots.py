"""Slots: the rows of a cache, one a token, written and read by slot; content as it is or quantised, lanes beside it.

Legend: B batch, Hk key heads, S slots, n slots of a reading or writing, D content width, W width with what is beside.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.checks import require

__all__ = ["STORES", "QuantisedSlots", "Slots", "make_slots", "put"]

#: Dtypes in which content may be stored: the largest number of a row becomes the largest of the dtype.
STORES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class Slots:
    """(B, Hk, S, W) numbers of one dtype: content in the first D columns.

    Args:
        shape: B, Hk, S and D.
        dtype: Of what is read.
        device: Of the storage.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | None) -> None:
        self._rows = torch.zeros(shape, dtype=dtype, device=device)
        self.shape, self.dtype, self.device, self.content_width = shape, dtype, self._rows.device, shape[-1]

    @property
    def width(self) -> int:
        """Width W."""
        return self._rows.shape[-1]

    @property
    def beside(self) -> Tensor:
        """(B, Hk, S, W - D), what stands beside the content, to be written to."""
        return self._rows[..., self.content_width :]

    @property
    def address(self) -> int:
        """Where content that is read as a view lies."""
        return self._rows.data_ptr()

    def tensors(self) -> list[Tensor]:
        """The storage."""
        return [self._rows]

    def content(self, at: slice) -> Tensor:
        """(B, Hk, n, D)."""
        return self._rows[:, :, at, : self.content_width]

    def rows(self, at: slice) -> Tensor:
        """(B, Hk, n, W)."""
        return self._rows[:, :, at]

    def write(self, at: slice, content: Tensor) -> None:
        """Put content (B, Hk, n, D) into slots."""
        self._rows[:, :, at, : self.content_width] = content

    def write_rows(self, at: Tensor, content: Tensor, beside: Tensor) -> None:
        """Put content and what stands beside it, (B, Hk, n, W - D), into slots: one operation, in place in graphs."""
        put(self._rows, at, torch.cat([content, beside], dim=-1))

    def widen(self, width: int) -> None:
        """Have at least ``width`` columns; new ones hold zero."""
        missing = width - self.width
        if missing > 0:
            self._rows = functional.pad(self._rows, (0, missing))

    def reorder(self, samples: Tensor, count: int) -> None:
        """Let the first ``count`` slots of sample b be those of sample ``samples[b]``."""
        for rows in self.tensors():
            rows[:, :, :count] = rows[samples, :, :count]


class QuantisedSlots(Slots):
    """Content in 8 bits with one scale a row, lanes beside it as they are: a prior loses nothing.

    A row is scaled by its largest number. What is read is a copy: memory is saved, not time.

    Args:
        shape: B, Hk, S and D.
        dtype: Of what is read, and of lanes.
        device: Of the storage.
        store: One of :data:`STORES`.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | None, store: torch.dtype
    ) -> None:
        super().__init__((*shape[:-1], 0), dtype, device)
        self.shape, self.store = shape, store
        self._codes = torch.zeros(shape, dtype=torch.int8, device=device)  # any dtype's bits: these can be indexed
        self._scales = torch.zeros((*shape[:-1], 1), dtype=torch.float32, device=device)

    @property
    def width(self) -> int:
        """Width W."""
        return self.shape[-1] + self._rows.shape[-1]

    def tensors(self) -> list[Tensor]:
        """The storage."""
        return [self._rows, self._codes, self._scales]

    def content(self, at: slice) -> Tensor:
        """(B, Hk, n, D), a copy."""
        codes = self._codes[:, :, at].view(self.store)
        return (codes.to(torch.float32) * self._scales[:, :, at]).to(self.dtype)

    def rows(self, at: slice) -> Tensor:
        """(B, Hk, n, W), a copy."""
        return torch.cat([self.content(at), self._rows[:, :, at]], dim=-1)

    def write(self, at: slice, content: Tensor) -> None:
        """Put content (B, Hk, n, D) into slots, rounded."""
        self._codes[:, :, at], self._scales[:, :, at] = self._quantised(content)

    def write_rows(self, at: Tensor, content: Tensor, beside: Tensor) -> None:
        """Put content, rounded, and what stands beside it, (B, Hk, n, W - D), into slots."""
        for rows, new in zip(self.tensors(), (beside, *self._quantised(content)), strict=True):
            put(rows, at, new)

    def _quantised(self, content: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of content."""
        wide = content.to(torch.float32)
        scales = wide.abs().amax(-1, keepdim=True) / STORES[self.store]
        codes = wide / scales.clamp(min=torch.finfo(torch.float32).tiny)
        return (codes.round() if self.store == torch.int8 else codes).to(self.store).view(torch.int8), scales


def make_slots(
    owner: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device | None,
    store: torch.dtype | None,
) -> Slots:
    """Empty slots that keep content as it is, or in ``store``."""
    if store is None:
        return Slots(shape, dtype, device)
    rule, remedy = "be torch.int8, torch.float8_e4m3fn or None", "Choose one of these"
    require(store in STORES, owner, "store", rule, store, remedy)
    return QuantisedSlots(shape, dtype, device, store)


def put(rows: Tensor, at: slice | Tensor, new: Tensor) -> None:
    """Write ``new`` into the slots ``at`` of ``rows`` (B, N, S, ...) or (B, N, S), in place."""
    if isinstance(at, slice):
        rows[:, :, at] = new
    else:
        rows.index_copy_(2, at, new.to(rows.dtype))
