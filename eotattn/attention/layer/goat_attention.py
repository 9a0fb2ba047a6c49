"""The paper's layer, by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from eotattn.attention.layer.prior_attention_layer import PriorAttention, num_reserved
from eotattn.checks import check_positive_int, speaking_as
from eotattn.priors import goat_prior

__all__ = ["GoatAttention"]

#: Frequencies of the relative part where heads are wide enough.
NUM_FREQUENCIES = 4


class GoatAttention(PriorAttention):
    """The paper's layer: :class:`PriorAttention` with the paper's :func:`goat_prior`, its lanes reserved from the head.

    Args:
        embed_dim: Model width E.
        num_heads: Query heads H.
        num_frequencies: Frequencies R of the relative part; the prior takes 2 R + 3 lanes of the head in float32. By
            default 4, or fewer where these would leave less than half of a head to the content.
        length_scale: Tokens over which u(j) varies; about the training length.
        init: ``"alibi"`` or ``"neutral"``, as in :func:`goat_prior`.
        keywords: Every other argument of :class:`PriorAttention`, e.g. ``batch_first``, ``num_kv_heads``, ``rotary``,
            ``kdim``, ``device`` and ``dtype``.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), section 3.

    Example:
        >>> layer = GoatAttention(embed_dim=64, num_heads=4, batch_first=True)
        >>> layer(torch.ones(1, 5, 64), is_causal=True, need_weights=False)[0].shape
        torch.Size([1, 5, 64])
    """

    @speaking_as("GoatAttention")
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_frequencies: int | None = None,
        length_scale: float = 2048.0,
        init: str = "alibi",
        **keywords: Any,
    ) -> None:
        owner, options = "GoatAttention", {"lanes": "reserved", **keywords}
        check_positive_int(owner, "embed_dim", embed_dim)
        check_positive_int(owner, "num_heads", num_heads)
        prior = partial(goat_prior, num_heads, form="paper", length_scale=length_scale, init=init)
        if num_frequencies is None:
            place, room = (options["lanes"], options.get("lane_dtype", torch.float32)), embed_dim // num_heads // 2
            counts = range(NUM_FREQUENCIES, 1, -1)
            fitting = (R for R in counts if num_reserved(owner, prior(num_frequencies=R), *place) <= room)
            num_frequencies = next(fitting, 1)
        check_positive_int(owner, "num_frequencies", num_frequencies)
        super().__init__(embed_dim, num_heads, prior=prior(num_frequencies=num_frequencies), **options)
