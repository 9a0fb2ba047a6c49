"""Figure 2's recipe at every scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from eotattn.experiments.networks import DecoderConfig
from eotattn.experiments.scales import check_scale
from eotattn.experiments.tasks.language import PYTHON_STDLIB
from eotattn.experiments.training import TrainingConfig

__all__ = ["LanguageRecipe", "language"]


@dataclass(frozen=True)
class LanguageRecipe:
    """Figure 2.

    Args:
        scale: Name of the scale.
        corpus: As in :func:`eotattn.experiments.tasks.find_texts`.
        variants: One decoder a curve; equal but for the attention.
        training: The run, once a variant and seed.
        seeds: Seeds of weights and batches.
        length_factors: Evaluation contexts as multiples of the training length.
        curve_windows: Held-out windows behind every point of the curve.
        sink_windows: Held-out windows behind the sink panel.
        sink_bins: Bins of signal strength.
    """

    scale: str
    corpus: str
    variants: tuple[DecoderConfig, ...]
    training: TrainingConfig
    seeds: tuple[int, ...]
    length_factors: tuple[int, ...]
    curve_windows: int
    sink_windows: int
    sink_bins: int

    @property
    def train_length(self) -> int:
        """Tokens of a training window."""
        return self.variants[0].train_length

    @property
    def lengths(self) -> tuple[int, ...]:
        """Evaluation contexts, tokens."""
        return tuple(factor * self.train_length for factor in self.length_factors)


def language(scale: str = "laptop") -> LanguageRecipe:
    """Figure 2 at a scale.

    ``"paper"`` has the paper's decoder, context, tokens, frequencies and precision on a folder ``c4`` of text files
    that the user provides. It reads bytes where the paper reads subwords, so its perplexities are per byte.
    Log-priors train at the rate of the content: a larger rate helps at the training length and hurts beyond it.

    Example:
        >>> language("laptop").lengths
        (128, 256, 512, 1024, 2048)
    """
    return _LANGUAGE[check_scale("language", scale)]


def _decoders(sizes: Mapping[str, int]) -> tuple[DecoderConfig, ...]:
    """Equal decoders with the three kinds of attention of figure 2, at the paper's frequencies (base 10 000)."""
    base = 2 * math.pi
    return tuple(
        DecoderConfig(name, **sizes, num_frequencies=4, min_period=base, max_period=base * 10_000)
        for name in ("rope", "alibi", "goat")
    )


_FACTORS = (1, 2, 4, 8, 16)

_LANGUAGE = {
    "smoke": LanguageRecipe(
        scale="smoke",
        corpus=PYTHON_STDLIB,
        variants=_decoders({"num_layers": 1, "embed_dim": 32, "num_heads": 4, "train_length": 32}),
        training=TrainingConfig(
            steps=20, batch_size=8, learning_rate=3e-3, prior_learning_rate=3e-3, warmup_steps=2, log_every=10
        ),
        seeds=(0,),
        length_factors=_FACTORS,
        curve_windows=8,
        sink_windows=8,
        sink_bins=6,
    ),
    "laptop": LanguageRecipe(
        scale="laptop",
        corpus=PYTHON_STDLIB,
        variants=_decoders({"num_layers": 3, "embed_dim": 96, "num_heads": 4, "train_length": 128}),
        training=TrainingConfig(
            steps=1000,
            batch_size=16,
            learning_rate=3e-3,
            prior_learning_rate=3e-3,
            warmup_steps=50,
            log_every=50,
            checkpoint_every=200,
        ),
        seeds=(0,),
        length_factors=_FACTORS,
        curve_windows=128,
        sink_windows=64,
        sink_bins=12,
    ),
    "h200": LanguageRecipe(
        scale="h200",
        corpus=PYTHON_STDLIB,
        variants=_decoders({"num_layers": 8, "embed_dim": 512, "num_heads": 8, "train_length": 512}),
        training=TrainingConfig(
            steps=2000,
            batch_size=64,
            learning_rate=1e-3,
            prior_learning_rate=1e-3,
            warmup_steps=100,
            log_every=50,
            precision="bf16",
        ),
        seeds=(0, 1, 2),
        length_factors=_FACTORS,
        curve_windows=128,
        sink_windows=64,
        sink_bins=16,
    ),
    "paper": LanguageRecipe(
        scale="paper",
        corpus="c4",
        variants=_decoders({"num_layers": 12, "embed_dim": 768, "num_heads": 12, "train_length": 2048}),
        training=TrainingConfig(
            steps=15_259,  # 4e9 tokens in batches of 128 windows of 2048
            batch_size=128,
            learning_rate=6e-4,
            prior_learning_rate=6e-4,
            warmup_steps=400,
            log_every=50,
            checkpoint_every=500,
            precision="bf16",
        ),
        seeds=(0,),
        length_factors=_FACTORS,
        curve_windows=64,
        sink_windows=16,
        sink_bins=16,
    ),
}
