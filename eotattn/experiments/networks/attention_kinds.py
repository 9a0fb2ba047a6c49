"""Kinds of attention by name, for decoders of given sizes: which prior, rotation and embedding tell them positions.

Legend: H heads, L tokens, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eotattn.attention import AttentionSinks, PriorAttention, Rotary
from eotattn.checks import check_choice, check_positive_int, require
from eotattn.experiments.networks.decaying_waves import DecayingFourierPrior
from eotattn.experiments.networks.growing_scores import GrowingScoreAttention
from eotattn.experiments.networks.narrow_lanes import NarrowLanesPrior
from eotattn.experiments.networks.rotations import LeadingHeadsRotary, StretchedRotary, YarnRotary
from eotattn.priors import (
    ForgettingPrior,
    FourierPrior,
    HeadsPrior,
    KerplePrior,
    LogPrior,
    RecencyPrior,
    SinkPrior,
    SumPrior,
    T5Prior,
    goat_prior,
    num_local_heads,
)

__all__ = ["ATTENTION_KINDS", "AttentionKind", "DecoderConfig", "display_name", "sinusoids"]

MakePrior = Callable[["DecoderConfig"], LogPrior]
MakeRotary = Callable[["DecoderConfig"], Rotary]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder and the name of its attention; the names share every size.

    Args:
        attention: A name in :data:`ATTENTION_KINDS`.
        vocabulary_size: Number of tokens V.
        num_layers: Blocks.
        embed_dim: Width E.
        num_heads: Heads of every block; divides ``embed_dim``.
        train_length: Tokens of a training window; the length scale of u(j) and of interpolated rotary positions.
        num_frequencies: Frequencies of the relative part of ``"goat"``.
        min_period: Their shortest period, tokens.
        max_period: Their longest period, tokens.
        block: ``"gpt"``: LayerNorm, GELU, biases in every projection; ``"llama"``: RMSNorm, SwiGLU, no biases.

    Example:
        >>> DecoderConfig("goat", num_layers=1, embed_dim=16, num_heads=2, train_length=8).attention
        'goat'
    """

    attention: str
    vocabulary_size: int = 256
    num_layers: int = 2
    embed_dim: int = 64
    num_heads: int = 4
    train_length: int = 64
    num_frequencies: int = 4
    min_period: float = 2 * math.pi
    max_period: float = 2 * math.pi * 10_000
    block: str = "gpt"

    def __post_init__(self) -> None:
        check_choice("DecoderConfig", "block", self.block, ("gpt", "llama"))
        check_choice("DecoderConfig", "attention", self.attention, tuple(ATTENTION_KINDS))
        for name in ("vocabulary_size", "num_layers", "embed_dim", "num_heads", "train_length", "num_frequencies"):
            check_positive_int("DecoderConfig", name, getattr(self, name))
        divides = self.embed_dim % (2 * self.num_heads) == 0
        rule = f"be a multiple of 2 * num_heads = {2 * self.num_heads}"
        require(divides, "DecoderConfig", "embed_dim", rule, self.embed_dim, "Heads need an even width")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.embed_dim // self.num_heads

    @property
    def kind(self) -> AttentionKind:
        """What the name of the attention stands for."""
        return ATTENTION_KINDS[self.attention]


@dataclass(frozen=True)
class AttentionKind:
    """How one kind of attention knows positions; what is left out it does not have.

    Args:
        label: Name in tables and legends; by default the one in :data:`ATTENTION_KINDS`.
        prior: Makes the log-prior of one block.
        rotary: Makes the rotation of its queries and keys.
        sinks: Makes what its queries attend to besides keys.
        output_gate: How a query scales what its heads gather, as in :class:`PriorAttention`.
        embedding: What is added to the embeddings of the tokens: fixed waves, or a learned table whose last entry
            stands for all positions beyond the training length.
        interpolated: Positions are squeezed into the training window where the sequence is longer.
        scores_grow: Scores grow with the logarithm of the position, see :class:`GrowingScoreAttention`.
        prior_rate_factor: Learning rate of the log-prior, and of sinks, over that of the content.
        trained_as: Name of a kind that it equals up to the training length, so that the trained weights of that kind
            serve this one too; see :meth:`Decoder.read_as`.
    """

    label: str = ""
    prior: MakePrior | None = None
    rotary: MakeRotary | None = None
    sinks: Callable[[DecoderConfig], AttentionSinks] | None = None
    output_gate: str | None = None
    embedding: Literal["sinusoidal", "learned"] | None = None
    interpolated: bool = False
    scores_grow: bool = False
    prior_rate_factor: float = 1.0
    trained_as: str | None = None

    def build(self, config: DecoderConfig) -> PriorAttention:
        """The attention layer of one block; kinds differ in nothing else."""
        parts: dict[str, Any] = {
            "prior": None if self.prior is None else self.prior(config),
            "rotary": None if self.rotary is None else self.rotary(config),
            "sinks": None if self.sinks is None else self.sinks(config),
            "output_gate": self.output_gate,
            "bias": config.block == "gpt",
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


def _yarn_rotary(config: DecoderConfig) -> Rotary:
    return YarnRotary(config.head_dim, train_length=config.train_length)


def _local_rotary(config: DecoderConfig) -> Rotary:
    return LeadingHeadsRotary(config.head_dim, num_rotated=num_local_heads(config.num_heads))


def _alibi(config: DecoderConfig) -> LogPrior:
    return RecencyPrior(config.num_heads).freeze()


def _t5(config: DecoderConfig) -> LogPrior:
    return T5Prior(config.num_heads, bidirectional=False)


def _kerple(config: DecoderConfig) -> LogPrior:
    return KerplePrior(config.num_heads)


def _recency(config: DecoderConfig) -> LogPrior:
    return RecencyPrior(config.num_heads)


def _tied_recency(config: DecoderConfig) -> LogPrior:
    """Mean lags from 2 tokens to eight training lengths: every head forgets, one of them slowly."""
    return RecencyPrior(config.num_heads, mean_lags=_geometric(2.0, 8.0 * config.train_length, config.num_heads))


def _half_global_recency(config: DecoderConfig) -> LogPrior:
    """Mean lags up to half of the training length for half of the heads, 64 training lengths for the others."""
    local = (config.num_heads + 1) // 2
    far = [64.0 * config.train_length] * (config.num_heads - local)
    return RecencyPrior(config.num_heads, mean_lags=_geometric(2.0, config.train_length / 2, local) + far)


def _floored_recency(config: DecoderConfig) -> LogPrior:
    """Slopes that start at ALiBi's and stay above half of them."""
    return 0.5 * RecencyPrior(config.num_heads).freeze() + 0.5 * RecencyPrior(config.num_heads)


def _geometric(first: float, last: float, count: int) -> list[float]:
    return [first * (last / first) ** (k / max(1, count - 1)) for k in range(count)]


def _waves(config: DecoderConfig) -> LogPrior:
    return FourierPrior(config.num_heads, config.num_frequencies, config.min_period, config.max_period)


def _decaying_waves(config: DecoderConfig) -> LogPrior:
    return DecayingFourierPrior(config.num_heads, config.num_frequencies, config.min_period, config.max_period)


def _shared_waves(config: DecoderConfig) -> LogPrior:
    one = FourierPrior(1, config.num_frequencies, config.min_period, config.max_period)
    return HeadsPrior(one, [0] * config.num_heads)


def _sink(config: DecoderConfig) -> LogPrior:
    return SinkPrior(config.num_heads, length_scale=float(config.train_length))


def _held_sink(config: DecoderConfig) -> LogPrior:
    length = float(config.train_length)
    return SinkPrior(config.num_heads, length_scale=length, horizon=length)


def _first_token(config: DecoderConfig) -> LogPrior:
    length = float(config.train_length)
    return SinkPrior(config.num_heads, 0, length, horizon=length)


def _shared_sink(config: DecoderConfig) -> LogPrior:
    return HeadsPrior(SinkPrior(1, length_scale=float(config.train_length)), [0] * config.num_heads)


def _alibi_goat(config: DecoderConfig) -> LogPrior:
    """Waves of the default form, ALiBi's slopes to start with, and its u(j)."""
    waves = FourierPrior(config.num_heads, config.num_frequencies, 2.5, max(2.5, config.train_length / 4))
    return SumPrior(waves, RecencyPrior(config.num_heads), _first_token(config))


def _forgetting(config: DecoderConfig) -> LogPrior:
    return ForgettingPrior(config.embed_dim, config.num_heads)


def _sink_logit(config: DecoderConfig) -> AttentionSinks:
    return AttentionSinks.logit(config.num_heads)


def _zero_key(config: DecoderConfig) -> AttentionSinks:
    return AttentionSinks.zero_key()


def _sum(*makers: MakePrior) -> MakePrior:
    """The sum of some priors."""
    return lambda config: SumPrior(*(make(config) for make in makers))


def _goat(config: DecoderConfig) -> LogPrior:
    length = float(config.train_length)
    return goat_prior(config.num_heads, num_frequencies=config.num_frequencies, length_scale=length)


def _paper_goat(**options: Any) -> MakePrior:
    """The paper's prior at the configuration's frequencies and length, with some options of one's own."""

    def make(config: DecoderConfig) -> LogPrior:
        of_config = {
            "num_frequencies": config.num_frequencies,
            "min_period": config.min_period,
            "max_period": config.max_period,
            "length_scale": float(config.train_length),
        }
        return goat_prior(config.num_heads, form="paper", **(of_config | options))

    return make


def _narrow_goat(config: DecoderConfig) -> LogPrior:
    """The paper's prior in naive lanes."""
    return NarrowLanesPrior(_paper_goat()(config))


def _tied_goat(config: DecoderConfig) -> LogPrior:
    """The paper's prior with waves that have run through within the training length."""
    return _paper_goat(min_period=4.0, max_period=float(config.train_length))(config)


#: Every attention that an experiment can name. A new one is one entry.
ATTENTION_KINDS = {
    # What the paper compares.
    "goat": AttentionKind("GOAT", prior=_goat),
    "paper_goat": AttentionKind("GOAT, paper's form", prior=_paper_goat()),
    "alibi": AttentionKind("ALiBi", prior=_alibi),
    "rope": AttentionKind("RoPE", rotary=_rotary),
    "interpolated_rope": AttentionKind("RoPE, interpolated", rotary=_rotary, interpolated=True, trained_as="rope"),
    "ntk_rope": AttentionKind("RoPE, NTK", rotary=_stretched_rotary, trained_as="rope"),
    "yarn_rope": AttentionKind("RoPE, YaRN", rotary=_yarn_rotary, trained_as="rope"),
    "t5": AttentionKind("T5's buckets", prior=_t5, prior_rate_factor=10.0),
    "kerple": AttentionKind("KERPLE", prior=_kerple, prior_rate_factor=10.0),
    "sinusoidal": AttentionKind("sinusoidal", embedding="sinusoidal"),
    "learned": AttentionKind(embedding="learned"),
    "none": AttentionKind("no positions"),
    # Priors on rotary content.
    "local_rotary_goat": AttentionKind("GOAT, local heads rotary", prior=_goat, rotary=_local_rotary),
    "rotary_goat": AttentionKind("RoPE + GOAT", prior=_paper_goat(), rotary=_rotary),
    "rotary_recency": AttentionKind(prior=_recency, rotary=_rotary),
    # Parts alone, and the whole without one.
    "recency_only": AttentionKind(prior=_recency),
    "relative_only": AttentionKind(prior=_waves),
    "sink_only": AttentionKind(prior=_sink),
    "without_waves": AttentionKind(prior=_sum(_recency, _sink)),
    "one_wave": AttentionKind(prior=_paper_goat(num_frequencies=1)),
    "sixteen_waves": AttentionKind(prior=_paper_goat(num_frequencies=16)),
    # Log-priors that can move further than content does: AdamW moves a number by its rate a step at most.
    "fast_goat": AttentionKind("GOAT, fast prior", prior=_goat, prior_rate_factor=10.0),
    "fast_paper_goat": AttentionKind("paper's form, fast prior", prior=_paper_goat(), prior_rate_factor=10.0),
    "alibi_goat": AttentionKind("GOAT, ALiBi slopes", prior=_alibi_goat, prior_rate_factor=10.0),
    "forgetting": AttentionKind("forgetting gate", prior=_forgetting),
    "alibi_goat_forgetting": AttentionKind(
        "GOAT + forgetting gate", prior=_sum(_alibi_goat, _forgetting), prior_rate_factor=10.0
    ),
    # Where a sink can live beside content.
    "rope_key_only": AttentionKind(prior=_first_token, rotary=_rotary, prior_rate_factor=10.0),
    "rope_sink_logit": AttentionKind(rotary=_rotary, sinks=_sink_logit, prior_rate_factor=10.0),
    "rope_zero_key": AttentionKind(rotary=_rotary, sinks=_zero_key),
    "rope_output_gate": AttentionKind(rotary=_rotary, output_gate="elementwise"),
    # What might keep a prior extrapolating.
    "tied_waves": AttentionKind(prior=_tied_goat),
    "shared_waves": AttentionKind(prior=_sum(_shared_waves, _recency, _shared_sink)),
    "held_sink": AttentionKind(prior=_sum(_waves, _recency, _held_sink)),
    "floored_slopes": AttentionKind(prior=_sum(_waves, _floored_recency, _sink)),
    "decaying_waves": AttentionKind(prior=_sum(_decaying_waves, _recency, _sink)),
    "narrow_lanes": AttentionKind(prior=_narrow_goat),
    "growing_scores": AttentionKind(prior=_paper_goat(), scores_grow=True),
    "tied_slopes": AttentionKind(prior=_sum(_tied_recency, _first_token)),
    "half_global": AttentionKind(prior=_sum(_half_global_recency, _first_token)),
    "growing_none": AttentionKind(scores_grow=True),
}


def display_name(attention: str) -> str:
    """What tables and legends call a kind.

    Example:
        >>> display_name("rope"), display_name("one_wave")
        ('RoPE', 'one_wave')
    """
    return ATTENTION_KINDS[attention].label or attention
