"""What the kernels of score sums read: queries, keys and lanes of one call.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, P lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["ScoreTiles"]


@dataclass(frozen=True, eq=False)
class ScoreTiles:
    """An attention call whose logits a kernel can make tile by tile: content + <query lanes, key lanes>.

    Key j is admissible for query i if the key mask admits it, ``j <= i + shift`` (causal) and
    ``j > i + shift - window`` (window).

    Args:
        query: (B, H, Q, D).
        key: (B, Hk, K, D); Hk divides H.
        scale: Factor on the inner products, positive.
        softcap: c of c tanh(score / c), nats, or ``None``.
        query_lanes: (B, H, Q, P), nats, in the dtype of ``query``; ``None`` without a prior.
        key_lanes: (B, Hk, K, P).
        key_mask: (B, K) boolean, true at admissible keys; ``None`` for all.
        is_causal: Whether later keys are inadmissible.
        window: Tokens, or ``None``.
        shift: Position of the first query less that of the first key, tokens.
    """

    query: Tensor
    key: Tensor
    scale: float
    softcap: float | None = None
    query_lanes: Tensor | None = None
    key_lanes: Tensor | None = None
    key_mask: Tensor | None = None
    is_causal: bool = False
    window: int | None = None
    shift: int = 0
