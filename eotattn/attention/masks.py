"""Masks: what was asked for in several arguments, in as few as kernels can use.

Legend: B batch, H query heads, Q queries, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention.call_positions import Band
from eotattn.attention.documents import PackedDocuments
from eotattn.checks import check_floating, check_shape, fail, require
from eotattn.priors.cumulative import cumulative_sums

__all__ = ["Masks", "check_padding_mask", "from_multihead_convention", "gather_masks"]


@dataclass(frozen=True)
class Masks:
    """What no log-prior of finite size can express: which keys are inadmissible.

    Args:
        dense: Broadcastable to (B, H, Q, K): boolean with true where a query may attend, or floating and added, nats.
            Then there is neither ``band`` nor ``documents``.
        padding: (B, K) boolean, true where a key is padding; a lane can carry it.
        key_bias: (B or 1, H or 1, K), nats, added to every score of a key; lanes carry it, as exactly as a log-prior.
        band: A causal pattern of indices that kernels know, within each document.
        documents: Queries see keys of their own document.
    """

    dense: Tensor | None = None
    padding: Tensor | None = None
    band: Band | None = None
    documents: PackedDocuments | None = None
    key_bias: Tensor | None = None

    @property
    def triangle(self) -> bool:
        """Whether query i sees keys 0 to i, and padding and ``dense`` say the rest."""
        return self.band is not None and self.band.is_triangle and self.documents is None

    def as_dense(self, batch: int, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """All of it as one mask, boolean or floating."""
        combined = _pattern(self.band, self.documents, batch, queries, keys, device)
        if self.padding is not None:
            combined = _both(combined, ~self.padding[:, None, None, :])
        if self.key_bias is not None:
            combined = _both(combined, self.key_bias[:, :, None, :])
        return combined if self.dense is None else self.dense if combined is None else _both(combined, self.dense)

    def has_keys(self, queries: int) -> Tensor | None:
        """Whether each query has an admissible key, (B, 1 or H, 1 or Q); ``None`` if dense masks decide too."""
        if (self.padding is None and self.key_bias is None) or self.dense is not None:
            return None
        real = None if self.padding is None else ~self.padding.unsqueeze(1)
        if self.key_bias is not None:
            biased = self.key_bias > float("-inf")
            real = biased if real is None else real & biased
        assert real is not None
        if self.documents is not None:
            return _has_keys_of_document(real, self.documents, self.band, queries)
        if self.band is None:
            return real.any(dim=-1, keepdim=True)
        counts, offset, window = cumulative_sums(real.long()), self.band.offset, self.band.window
        seen = counts[..., offset : offset + queries]
        if window is None:
            return seen > 0
        return seen > functional.pad(counts, (window, 0))[..., offset : offset + queries]


def _has_keys_of_document(real: Tensor, documents: PackedDocuments, band: Band | None, length: int) -> Tensor:
    """Whether each query sees a key of its own document that is ``real``, (1 or B, 1 or H, L): (B, 1 or H, L)."""
    batch, device = documents.total // length, real.device
    index, ids = torch.arange(length, device=device), documents.ids(batch, length, device)
    ends = documents.offsets(device).long()
    start_of_row = length * torch.arange(batch, device=device)[:, None]
    first, last = ends[ids] - start_of_row, ends[ids + 1] - start_of_row
    if band is not None:
        last = (index + 1).expand_as(last)
        first = first if band.window is None else torch.maximum(first, index + 1 - band.window)
    counts = functional.pad(cumulative_sums(real.long()), (1, 0)).expand(batch, -1, -1)
    before, upto = (counts.gather(2, at[:, None].expand(-1, counts.shape[1], -1)) for at in (first, last))
    return upto > before


def _pattern(
    band: Band | None, documents: PackedDocuments | None, batch: int, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """What index and document decide, (Q, K) or (B, 1, Q, K) boolean."""
    visible = None if band is None else band.mask(queries, keys, device)
    return visible if documents is None else _both(visible, documents.mask(batch, keys, device))


def _both(mask: Tensor | None, other: Tensor) -> Tensor:
    """Two masks as one; each boolean (true where visible), or floating and added."""
    if mask is None:
        return other
    if mask.dtype == torch.bool:
        return mask & other if other.dtype == torch.bool else torch.where(mask, other, float("-inf"))
    return torch.where(other, mask, float("-inf")) if other.dtype == torch.bool else mask + other


def gather_masks(
    owner: str,
    shape: tuple[int, int, int, int],
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    causal: Band | Tensor | None,
    documents: PackedDocuments | None = None,
) -> Masks:
    """Check all masks of a call and bring them into as few as possible.

    Args:
        owner: Who asks, for errors.
        shape: (B, H, Q, K).
        attn_mask: Broadcastable to ``shape``; boolean with true where a query may attend, or floating, added in nats.
        key_padding_mask: (B, K) boolean, true where a key is padding.
        causal: A pattern of indices or a mask of visible keys.
        documents: Documents packed into the batch.
    """
    batch, _, queries, keys = shape
    if key_padding_mask is not None:
        check_padding_mask(owner, key_padding_mask, (batch, keys), "One entry a key")
    if attn_mask is None and not isinstance(causal, Tensor):
        return Masks(None, key_padding_mask, causal, documents)
    dense: Tensor | None = None
    if attn_mask is not None:
        _check_attn_mask(owner, attn_mask, shape)
        dense = _with_four_axes(attn_mask)
        if dense.shape[2:] == (1, keys) and queries > 1 and not isinstance(causal, Tensor):
            return _of_keys(dense, key_padding_mask, causal, documents, batch)
    if isinstance(causal, Tensor):
        return Masks(causal if dense is None else _both(causal, dense), key_padding_mask)
    assert dense is not None
    pattern = _pattern(causal, documents, batch, queries, keys, dense.device)
    return Masks(_both(pattern, dense), key_padding_mask)


def _with_four_axes(mask: Tensor) -> Tensor:
    """The mask with four axes; the lowest number of a floating dtype counts as -inf, since casts make it that."""
    mask = mask[(None,) * (4 - mask.dim())]
    if not mask.is_floating_point():
        return mask
    return mask.masked_fill(mask == torch.finfo(mask.dtype).min, float("-inf"))


def _of_keys(
    mask: Tensor, padding: Tensor | None, causal: Band | None, documents: PackedDocuments | None, batch: int
) -> Masks:
    """Masks of which ``mask`` (B or 1, H or 1, 1, K) depends on the key alone."""
    rest: dict[str, Any] = {"band": causal, "documents": documents}
    if mask.is_floating_point():
        return Masks(None, padding, key_bias=mask.squeeze(2), **rest)
    if mask.shape[1] > 1:
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
        return Masks(None, padding, key_bias=bias.squeeze(2), **rest)
    hidden = ~mask[:, 0, 0] if padding is None else ~mask[:, 0, 0] | padding
    return Masks(None, hidden.expand(batch, -1), **rest)


def check_padding_mask(owner: str, mask: Tensor, shape: tuple[int, int], remedy: str) -> None:
    """Raise unless ``mask`` is boolean and of ``shape``."""
    is_boolean, compare = isinstance(mask, Tensor) and mask.dtype == torch.bool, "Compare tokens with the padding token"
    require(is_boolean, owner, "key_padding_mask", "be a boolean tensor", mask, compare, error=TypeError)
    check_shape(owner, "key_padding_mask", mask, shape, remedy)


def _check_attn_mask(owner: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        check_floating(owner, "attn_mask (boolean where true may attend, or floating and added)", mask)
    padded = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    fits = mask.dim() <= 4 and all(have in (1, want) for have, want in zip(padded, shape, strict=True))
    if not fits:
        fail(owner, "attn_mask", f"broadcast to {shape}", mask, "Add or drop axes")


def from_multihead_convention(
    owner: str, attn_mask: Tensor | None, key_padding_mask: Tensor | None, *, batch: int, num_heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """Translate the masks of ``nn.MultiheadAttention`` into those of :func:`gather_masks`.

    There a boolean ``attn_mask`` is true where a query may *not* attend, three axes mean (B * H, Q, K), and a padding
    mask may be floating (added to the score).
    """
    mask, padding = attn_mask, key_padding_mask
    if mask is not None:
        typed = isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.is_floating_point())
        rule = "be boolean (true may not attend) or floating (added to the score)"
        require(typed, owner, "attn_mask", rule, mask, "Cast it", error=TypeError)
        if mask.dim() == 3:
            if mask.shape[0] != batch * num_heads:
                fail(owner, "attn_mask", f"have {batch} * {num_heads} matrices", mask, "Use (B, H, Q, K) otherwise")
            mask = mask.unflatten(0, (batch, num_heads))
        mask = ~mask if mask.dtype == torch.bool else mask
    if isinstance(padding, Tensor) and padding.dim() == 1:
        padding = padding.unsqueeze(0)
    if not isinstance(padding, Tensor) or not padding.is_floating_point():
        return mask, padding
    added = padding[:, None, None, :]
    if mask is None:
        return added, None
    return (torch.where(mask, added, float("-inf")) if mask.dtype == torch.bool else mask + added), None
