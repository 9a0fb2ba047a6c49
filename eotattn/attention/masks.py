"""Masks: what was asked for in several arguments, in as few as kernels can use.

Legend: B batch, H query heads, Q queries, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_shape, fail, require

__all__ = ["Masks", "from_multihead_convention", "gather_masks"]


def triangle_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(Q, K) boolean: query index i sees key indices 0 to i."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


@dataclass(frozen=True)
class Masks:
    """What no log-prior of finite size can express: which keys are inadmissible.

    Args:
        dense: Broadcastable to (B, H, Q, K): boolean with true where a query may attend, or floating and added, nats.
        padding: (B, K) boolean, true where a key is padding; a lane can carry it.
        triangle: Query index i sees key indices 0 to i; kernels do this themselves. Never together with ``dense``.
    """

    dense: Tensor | None = None
    padding: Tensor | None = None
    triangle: bool = False

    def as_dense(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """All of it as one mask, boolean or floating."""
        boolean: list[Tensor] = [triangle_mask(queries, keys, device)] if self.triangle else []
        if self.padding is not None:
            boolean.append(~self.padding[:, None, None, :])
        bias = None
        if self.dense is not None and self.dense.dtype == torch.bool:
            boolean.append(self.dense)
        elif self.dense is not None:
            bias = self.dense
        if not boolean:
            return bias
        combined = boolean[0]
        for mask in boolean[1:]:
            combined = combined & mask
        return combined if bias is None else torch.where(combined, bias, float("-inf"))

    def has_keys(self) -> Tensor | None:
        """Whether each query has an admissible key, (B, 1 or Q); ``None`` if more than padding and triangle decide."""
        if self.padding is None or self.dense is not None:
            return None
        real = ~self.padding
        return real.cumsum(dim=1) > 0 if self.triangle else real.any(dim=1, keepdim=True)


def gather_masks(
    owner: str,
    shape: tuple[int, int, int, int],
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    causal: Tensor | bool,
) -> Masks:
    """Check all masks of a call and bring them into as few as possible.

    Args:
        owner: Who asks, for errors.
        shape: (B, H, Q, K).
        attn_mask: Broadcastable to ``shape``; boolean with true where a query may attend, or floating, added in nats.
        key_padding_mask: (B, K) boolean, true where a key is padding.
        causal: A mask of visible keys, or ``True`` for the kernel's own triangle, or ``False`` for none.
    """
    if key_padding_mask is not None:
        is_boolean = isinstance(key_padding_mask, Tensor) and key_padding_mask.dtype == torch.bool
        remedy = "Compare the tokens with the padding token"
        require(is_boolean, owner, "key_padding_mask", "be a boolean tensor", key_padding_mask, remedy, error=TypeError)
        check_shape(owner, "key_padding_mask", key_padding_mask, (shape[0], shape[3]), "One entry a key")
    if attn_mask is not None:
        _check_attn_mask(owner, attn_mask, shape)
        attn_mask = torch.atleast_2d(attn_mask)  # fused calls want the two last axes to be there
    if isinstance(causal, Tensor) and attn_mask is None:
        attn_mask, causal = causal, False
    if attn_mask is None or causal is False:
        return Masks(attn_mask, key_padding_mask, causal is True)
    visible = causal if isinstance(causal, Tensor) else triangle_mask(shape[2], shape[3], attn_mask.device)
    if attn_mask.dtype == torch.bool:
        return Masks(attn_mask & visible, key_padding_mask)
    return Masks(torch.where(visible, attn_mask, float("-inf")), key_padding_mask)


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
    if padding is not None and padding.dim() == 1:
        padding = padding.unsqueeze(0)
    if padding is None or not padding.is_floating_point():
        return mask, padding
    added = padding[:, None, None, :]
    if mask is None:
        return added, None
    return (torch.where(mask, added, float("-inf")) if mask.dtype == torch.bool else mask + added), None
