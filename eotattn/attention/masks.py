"""Masks: what was asked for in several arguments, as one mask for a kernel.

Legend: B batch, H query heads, Q queries, K keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.checks import check_floating, check_shape, require

__all__ = ["combine_masks", "from_multihead_convention", "triangle_mask"]


def triangle_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(Q, K) boolean: query index i sees key indices 0 to i."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


def combine_masks(
    owner: str,
    shape: tuple[int, int, int, int],
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    causal: Tensor | bool,
) -> tuple[Tensor | None, bool]:
    """Combine all masks of a call into at most one.

    Args:
        owner: Who asks, for errors.
        shape: (B, H, Q, K).
        attn_mask: Broadcastable to ``shape``; boolean with true where a query may attend, or floating, added in nats.
        key_padding_mask: (B, K) boolean, true where a key is padding.
        causal: A mask of visible keys, or ``True`` for the kernel's own triangle, or ``False`` for none.

    Returns:
        ``(mask, triangle)``: the combined mask, boolean or floating, or ``None``; and whether the kernel's own causal
        triangle is to be used, which it is only where no mask is left.
    """
    boolean: list[Tensor] = [causal] if isinstance(causal, Tensor) else []
    bias = None
    if key_padding_mask is not None:
        is_boolean = isinstance(key_padding_mask, Tensor) and key_padding_mask.dtype == torch.bool
        remedy = "Compare the tokens with the padding token"
        require(is_boolean, owner, "key_padding_mask", "be a boolean tensor", key_padding_mask, remedy, error=TypeError)
        check_shape(owner, "key_padding_mask", key_padding_mask, (shape[0], shape[3]), "One entry a key")
        boolean.append(~key_padding_mask[:, None, None, :])
    if attn_mask is not None:
        _check_attn_mask(owner, attn_mask, shape)
        if attn_mask.dtype == torch.bool:
            boolean.append(attn_mask)
        else:
            bias = attn_mask
    if causal is True:
        if not boolean and bias is None:
            return None, True
        device = boolean[0].device if bias is None else bias.device
        boolean.append(triangle_mask(shape[2], shape[3], device))
    if not boolean:
        return bias, False
    combined = boolean[0]
    for mask in boolean[1:]:
        combined = combined & mask
    return (combined if bias is None else torch.where(combined, bias, float("-inf"))), False


def _check_attn_mask(owner: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        check_floating(owner, "attn_mask (boolean where true may attend, or floating and added)", mask)
    padded = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    fits = mask.dim() <= 4 and all(have in (1, want) for have, want in zip(padded, shape, strict=True))
    require(fits, owner, "attn_mask", f"broadcast to {shape}", mask, "Add or drop axes")


def from_multihead_convention(
    owner: str, attn_mask: Tensor | None, key_padding_mask: Tensor | None, *, batch: int, num_heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """Translate the masks of ``nn.MultiheadAttention`` into those of :func:`combine_masks`.

    There a boolean ``attn_mask`` is true where a query may *not* attend, three axes mean (B * H, Q, K), and a padding
    mask may be floating (added to the score).
    """
    mask, padding = attn_mask, key_padding_mask
    if mask is not None:
        typed = isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.is_floating_point())
        rule = "be boolean (true may not attend) or floating (added to the score)"
        require(typed, owner, "attn_mask", rule, mask, "Cast it", error=TypeError)
        if mask.dim() == 3:
            rule = f"have {batch} * {num_heads} matrices"
            require(mask.shape[0] == batch * num_heads, owner, "attn_mask", rule, mask, "Use (B, H, Q, K) otherwise")
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
