"""A one-layer reader whose prior does all the routing.

Legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from eotattn.attention import PriorAttention
from eotattn.priors import SumPrior, goat_prior

__all__ = ["CopyReader", "CopyReaderConfig"]


@dataclass(frozen=True)
class CopyReaderConfig:
    """Sizes of a :class:`CopyReader`.

    Args:
        vocabulary_size: Number of tokens V.
        embed_dim: Width E.
        num_heads: Heads.
        num_frequencies: Frequencies of the relative part.
        min_period: Their shortest period, tokens.
        max_period: Their longest period, tokens.
        length_scale: Tokens over which u(j) varies.

    Example:
        >>> CopyReaderConfig(embed_dim=16).num_heads
        1
    """

    vocabulary_size: int = 16
    embed_dim: int = 32
    num_heads: int = 1
    num_frequencies: int = 8
    min_period: float = 2.5
    max_period: float = 64.0
    length_scale: float = 32.0


class CopyReader(nn.Module):
    """One attention layer with a GOAT prior between an embedding and a readout: a causal language model without skips.

    There is no residual connection around the attention: it would hand the current token, which is the previous one
    of the token to predict, to the readout without any attention. The prior starts neutral, at exactly zero, so that
    whatever it shows in the end was learned.

    Args:
        config: Sizes.

    Example:
        >>> import torch
        >>> CopyReader(CopyReaderConfig())(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, config: CopyReaderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.embed_dim)
        prior = goat_prior(
            config.num_heads,
            form="paper",
            num_frequencies=config.num_frequencies,
            min_period=config.min_period,
            max_period=config.max_period,
            length_scale=config.length_scale,
            init="neutral",
        )
        self.attention = PriorAttention(config.embed_dim, config.num_heads, prior=prior, batch_first=True)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.readout = nn.Linear(config.embed_dim, config.vocabulary_size)

    @property
    def prior(self) -> SumPrior:
        """The learned log-prior; its parts are the relative waves, the recency and the key-only part."""
        prior = self.attention.prior
        assert isinstance(prior, SumPrior)
        return prior

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, L) int64 tokens to (B, L, V) logits of the next token."""
        attended, _ = self.attention(self.embedding(tokens), need_weights=False, is_causal=True)
        return self.readout(self.norm(attended))
