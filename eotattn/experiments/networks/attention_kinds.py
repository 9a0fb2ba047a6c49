"""Kinds of attention by name: each says which prior, which rotation and which embedding tell it positions.

Legend: H heads, L tokens, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from eotattn.attention import PriorAttention, Rotary
from eotattn.experiments.networks.growing_scores import GrowingScoreAttention
from eotattn.experiments.networks.rotations import LeadingHeadsRotary, StretchedRotary
from eotattn.priors import FourierPrior, LogPrior, RecencyPrior, SinkPrior, goat_prior

if TYPE_CHECKING:
    from eotattn.experiments.networks.decoder import DecoderConfig

__all__ = ["ATTENTION_KINDS", "AttentionKind", "sinusoids"]

MakePrior = Callable[["DecoderConfig"], LogPrior]
MakeRotary = Callable[["DecoderConfig"], Rotary]


@dataclass(frozen=True)
class AttentionKind:
    """How one kind of attention knows positions; what is left out it does not have.

    Args:
        prior: Makes the log-prior of one block.
        rotary: Makes the rotation of its queries and keys.
        embedding: What is added to the embeddings of the tokens: fixed waves, or a learned table whose last entry
            stands for all positions beyond the training length.
        interpolated: Positions are squeezed into the training window where the sequence is longer.
        scores_grow: Scores grow with the logarithm of the position, see :class:`GrowingScoreAttention`.
        trained_as: Name of a kind that it equals up to the training length, so that the trained weights of that kind
            serve this one too; see :meth:`Decoder.read_as`.
    """

    prior: MakePrior | None = None
    rotary: MakeRotary | None = None
    embedding: Literal["sinusoidal", "learned"] | None = None
    interpolated: bool = False
    scores_grow: bool = False
    trained_as: str | None = None

    def build(self, config: DecoderConfig) -> PriorAttention:
        """The attention layer of one block; kinds differ in nothing else."""
        parts: dict[str, Any] = {
            "prior": None if self.prior is None else self.prior(config),
            "rotary": None if self.rotary is None else self.rotary(config),
        }
        sizes = (config.embed_dim, config.num_heads)
        if self.scores_grow:
            return GrowingScoreAttention(*sizes, train_length=config.train_length, **parts)
        return PriorAttention(*sizes, **parts)

    def positions(self, length: int, config: DecoderConfig) -> Tensor | None:
        """(L,) positions that every layer gets, tokens; None stands for 0 ... L - 1."""
        if not self.interpolated:
            return None
        return torch.arange(length) * min(1.0, config.train_length / length)


def sinusoids(length: int, width: int) -> Tensor:
    """(L, E) sine and cosine waves of geometric frequencies, base 10 000 (Vaswani et al. 2017, section 3.5)."""
    angle = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def _rotary(config: DecoderConfig) -> Rotary:
    return Rotary(config.head_dim)


def _stretched_rotary(config: DecoderConfig) -> Rotary:
    return StretchedRotary(config.head_dim, train_length=config.train_length)


def _local_rotary(config: DecoderConfig) -> Rotary:
    return LeadingHeadsRotary(config.head_dim, num_rotated=(config.num_heads + 1) // 2)


def _alibi(config: DecoderConfig) -> LogPrior:
    return RecencyPrior(config.num_heads).freeze()


def _recency(config: DecoderConfig) -> LogPrior:
    return RecencyPrior(config.num_heads)


def _relative(config: DecoderConfig) -> LogPrior:
    return FourierPrior(config.num_heads, config.num_frequencies, config.min_period, config.max_period)


def _sink(config: DecoderConfig) -> LogPrior:
    return SinkPrior(config.num_heads, length_scale=float(config.train_length))


def _goat(**options: Any) -> MakePrior:
    """The paper's prior at the configuration's frequencies and length, with some options of one's own."""

    def make(config: DecoderConfig) -> LogPrior:
        of_config = {
            "num_frequencies": config.num_frequencies,
            "min_period": config.min_period,
            "max_period": config.max_period,
            "length_scale": float(config.train_length),
        }
        return goat_prior(config.num_heads, **(of_config | options))

    return make


#: Every attention that an experiment can name. A new one is one entry.
ATTENTION_KINDS = {
    "goat": AttentionKind(prior=_goat()),
    "paper_goat": AttentionKind(prior=_goat()),
    "alibi": AttentionKind(prior=_alibi),
    "rope": AttentionKind(rotary=_rotary),
    "interpolated_rope": AttentionKind(rotary=_rotary, interpolated=True, trained_as="rope"),
    "ntk_rope": AttentionKind(rotary=_stretched_rotary, trained_as="rope"),
    "sinusoidal": AttentionKind(embedding="sinusoidal"),
    "learned": AttentionKind(embedding="learned"),
    "none": AttentionKind(),
    "rotary_goat": AttentionKind(prior=_goat(), rotary=_rotary),
    "rotary_recency": AttentionKind(prior=_recency, rotary=_rotary),
    "local_rotary_goat": AttentionKind(prior=_goat(), rotary=_local_rotary),
    "recency_only": AttentionKind(prior=_recency),
    "relative_only": AttentionKind(prior=_relative),
    "sink_only": AttentionKind(prior=_sink),
    "growing_goat": AttentionKind(prior=_goat(), scores_grow=True),
    "growing_none": AttentionKind(scores_grow=True),
}
