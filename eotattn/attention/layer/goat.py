"""The paper's layer, by name."""

from __future__ import annotations

from eotattn.attention.layer.module import PriorAttention
from eotattn.checks import speaking_as
from eotattn.priors import goat_prior

__all__ = ["GoatAttention"]


class GoatAttention(PriorAttention):
    """The paper's layer: :class:`PriorAttention` with the paper's :func:`goat_prior`, its lanes reserved from the head.

    Args:
        embed_dim: Model width E.
        num_heads: Query heads H.
        num_kv_heads: Key and value heads; by default H.
        num_frequencies: Frequencies R of the relative part; the prior takes 2 R + 2 lanes of the head.
        length_scale: Tokens over which u(j) varies; about the training length.
        init: ``"alibi"`` or ``"neutral"``, as in :func:`goat_prior`.
        dropout: Probability of dropping a weight in training.
        bias: Whether the projections have biases.
        batch_first: Whether inputs are (B, length, E).

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), section 3.

    Example:
        >>> layer = GoatAttention(embed_dim=64, num_heads=4, num_frequencies=3)
        >>> layer.content_dim, layer.head_dim
        (8, 16)
    """

    @speaking_as("GoatAttention")
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        num_frequencies: int = 4,
        length_scale: float = 2048.0,
        init: str = "alibi",
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            prior=goat_prior(
                num_heads, form="paper", num_frequencies=num_frequencies, length_scale=length_scale, init=init
            ),
            lanes="reserved",
            dropout=dropout,
            bias=bias,
            batch_first=batch_first,
        )
