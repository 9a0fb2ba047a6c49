"""What was measured: how backends compare, so that ``backend="auto"`` chooses by knowledge and can say why."""

from __future__ import annotations

from eotattn.attention.masks import Masks

__all__ = ["preference"]


def preference(masks: Masks) -> tuple[str, ...]:
    """Backends for calls with these masks, the fastest first."""
    if masks.documents is not None or (masks.band is not None and not masks.band.is_triangle):
        return ("varlen", "sdpa", "flex", "reference")
    return ("sdpa", "flex", "varlen", "reference")
