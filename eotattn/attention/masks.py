"""Masks: what was asked for in several arguments, in as few as kernels can use.

Legend: B batch, H query heads, Q queries, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention.documents import PackedDocuments
from eotattn.attention.positions import Band
from eotattn.checks import check_floating, check_shape, fail, require

__all__ = ["Masks", "check_padding_mask", "from_multihead_convention", "gather_masks"]


@dataclass(frozen=True)
class Masks:
    """What no log-prior of finite size can express: which keys are inadmissible.

    Args:
        dense: Broadcastable to (B, H, Q, K): boolean with true where a query may attend, or floating and added, nats.
            Then there is neither ``band`` nor ``documents``.
        padding: (B, K) boolean, true where a key is padding; a lane can carry it.
        band: A causal pattern of indices that kernels know, within each document.
        documents: Queries see keys of their own document.
    """

    dense: Tensor | None = None
    padding: Tensor | None = None
    band: Band | None = None
    documents: PackedDocuments | None = None

    @property
    def triangle(self) -> bool:
        """Whether query i sees keys 0 to i, and padding and ``dense`` say the rest."""
        return self.band is not None and self.band.is_triangle and self.documents is None

    def spelled_out(self, batch: int, queries: int, keys: int, device: torch.device) -> Masks:
        """The same masks with a pattern other than the triangle as a dense mask, for those who read nothing else."""
        if self.triangle or (self.band is None and self.documents is None):
            return self
        return Masks(_pattern(self.band, self.documents, batch, queries, keys, device), self.padding)

    def as_dense(self, batch: int, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """All of it as one mask, boolean or floating."""
        combined = _pattern(self.band, self.documents, batch, queries, keys, device)
        if self.padding is not None:
            combined = _both(combined, ~self.padding[:, None, None, :])
        return combined if self.dense is None else self.dense if combined is None else _both(combined, self.dense)

    def has_keys(self, queries: int) -> Tensor | None:
        """Whether each query has an admissible key, (B, 1 or Q); ``None`` if more than padding and band decide."""
        if self.padding is None or self.dense is not None:
            return None
        real = ~self.padding
        if self.band is None:
            return real.any(dim=1, keepdim=True)
        counts, offset, window = real.cumsum(dim=1), self.band.offset, self.band.window
        seen = counts[:, offset : offset + queries]
        if window is None:
            return seen > 0
        return seen > functional.pad(counts, (window, 0))[:, offset : offset + queries]


def _pattern(
    band: Band | None, documents: PackedDocuments | None, batch: int, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """What index and document decide, (Q, K) or (B, 1, Q, K) boolean."""
    visible = None if band is None else band.mask(queries, keys, device)
    return visible if documents is None else _both(visible, documents.mask(batch, keys, device))


def _both(visible: Tensor | None, mask: Tensor) -> Tensor:
    """A boolean mask and another one, boolean or floating."""
    if visible is None:
        return mask
    return visible & mask if mask.dtype == torch.bool else torch.where(visible, mask, float("-inf"))


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
    if attn_mask is not None:
        _check_attn_mask(owner, attn_mask, shape)
        attn_mask = torch.atleast_2d(attn_mask)  # fused calls want the two last axes to be there
    if isinstance(causal, Tensor):
        dense = causal if attn_mask is None else _both(causal, attn_mask)
        return Masks(dense, key_padding_mask)
    if attn_mask is None:
        return Masks(None, key_padding_mask, causal, documents)
    pattern = _pattern(causal, documents, batch, queries, keys, attn_mask.device)
    return Masks(_both(pattern, attn_mask), key_padding_mask)


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
