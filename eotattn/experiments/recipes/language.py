"""Figure 2's recipe at every scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eotattn.experiments.networks import DecoderConfig
from eotattn.experiments.scales import check_scale
from eotattn.experiments.tasks.language import PYTHON_STDLIB
from eotattn.experiments.training import TrainingConfig

__all__ = ["LanguageRecipe", "RateSweep", "language"]


@dataclass(frozen=True)
class RateSweep:
    """How learning rates are chosen: short runs of the first seed, judged on validation files at the training length.

    Args:
        rates: Candidates, the same for every swept variant; log-priors train at the rate of the content, but for kinds
            with a factor of their own.
        training: A short run; its rates are replaced by the candidates.
        windows: Validation windows that judge it.
    """

    rates: tuple[float, ...]
    training: TrainingConfig
    windows: int


@dataclass(frozen=True)
class LanguageRecipe:
    """Figure 2.

    Args:
        scale: Name of the scale.
        corpus: As in :meth:`eotattn.experiments.tasks.LanguageTask.from_corpus`.
        variants: Decoders with a sweep of their own and all seeds; equal but for the attention.
        contrasts: Decoders for contrast: first seed alone, at the rate that the sweep chose for the first variant.
        readings: Pairs (kind, variant): the trained variant is also read with another kind's positions.
        sweep: How rates are chosen.
        training: The run, once a variant and seed; its rates are replaced by the chosen one.
        seeds: Seeds of weights and batches.
        length_factors: Evaluation contexts as multiples of the training length.
        curve_windows: Held-out windows behind every point of the curve.
        sink_windows: Held-out windows behind the sink panel.
        sink_bins: Bins of signal strength.
        probe_windows: Validation windows on which sinks are watched during training.
    """

    scale: str
    corpus: str
    variants: tuple[DecoderConfig, ...]
    contrasts: tuple[DecoderConfig, ...]
    readings: tuple[tuple[str, str], ...]
    sweep: RateSweep
    training: TrainingConfig
    seeds: tuple[int, ...]
    length_factors: tuple[int, ...]
    curve_windows: int
    sink_windows: int
    sink_bins: int
    probe_windows: int

    @property
    def train_length(self) -> int:
        """Tokens of a training window."""
        return self.variants[0].train_length

    @property
    def lengths(self) -> tuple[int, ...]:
        """Evaluation contexts, tokens."""
        return tuple(factor * self.train_length for factor in self.length_factors)

    def readings_of(self, variant: str) -> tuple[str, ...]:
        """Kinds that a trained variant is also read as."""
        return tuple(kind for kind, trained in self.readings if trained == variant)


def language(scale: str = "laptop") -> LanguageRecipe:
    """Figure 2 at a scale.

    ``"paper"`` has the paper's decoder, context, tokens, frequencies and precision on C4. It reads bytes where the
    paper reads subwords, so its perplexities are per byte.

    Example:
        >>> language("laptop").lengths
        (128, 256, 512, 1024, 2048)
    """
    return _LANGUAGE[check_scale("language", scale)]


def _decoders(names: tuple[str, ...], sizes: Mapping[str, Any]) -> tuple[DecoderConfig, ...]:
    """Equal decoders, at the paper's frequencies (base 10 000)."""
    base = 2 * math.pi
    return tuple(
        DecoderConfig(name, **sizes, num_frequencies=4, min_period=base, max_period=base * 10_000) for name in names
    )


_VARIANTS = ("rope", "alibi", "paper_goat", "goat", "fast_goat", "local_rotary_goat")
_LAPTOP_VARIANTS = _VARIANTS[:4]
_CONTRASTS = ("fast_paper_goat", "none", "sinusoidal")
_LAPTOP_CONTRASTS = ("fast_goat", *_CONTRASTS[:2])
_READINGS = (("interpolated_rope", "rope"), ("ntk_rope", "rope"))
_FACTORS = (1, 2, 4, 8, 16)

_SMOKE = {"num_layers": 1, "embed_dim": 32, "num_heads": 4, "train_length": 32}
_LAPTOP = {"num_layers": 2, "embed_dim": 64, "num_heads": 4, "train_length": 128}
_H200 = {"num_layers": 10, "embed_dim": 512, "num_heads": 8, "train_length": 1024}
_PAPER = {"num_layers": 12, "embed_dim": 768, "num_heads": 12, "train_length": 2048}

_LANGUAGE = {
    "smoke": LanguageRecipe(
        scale="smoke",
        corpus=PYTHON_STDLIB,
        variants=_decoders(_VARIANTS, _SMOKE),
        contrasts=_decoders(_CONTRASTS, _SMOKE),
        readings=_READINGS,
        sweep=RateSweep((3e-3, 1e-2), TrainingConfig(steps=4, batch_size=8, warmup_steps=1), windows=8),
        training=TrainingConfig(steps=20, batch_size=8, warmup_steps=2, log_every=10, evaluate_every=10),
        seeds=(0, 1),
        length_factors=_FACTORS,
        curve_windows=8,
        sink_windows=8,
        sink_bins=6,
        probe_windows=2,
    ),
    "laptop": LanguageRecipe(
        scale="laptop",
        corpus=PYTHON_STDLIB,
        variants=_decoders(_LAPTOP_VARIANTS, _LAPTOP),
        contrasts=_decoders(_LAPTOP_CONTRASTS, _LAPTOP),
        readings=_READINGS,
        sweep=RateSweep((2e-3, 4e-3, 8e-3), TrainingConfig(steps=200, batch_size=16, warmup_steps=20), windows=64),
        training=TrainingConfig(
            steps=750, batch_size=16, warmup_steps=50, log_every=50, evaluate_every=75, checkpoint_every=250
        ),
        seeds=(0, 1, 2),
        length_factors=_FACTORS,
        curve_windows=64,
        sink_windows=64,
        sink_bins=12,
        probe_windows=4,
    ),
    "h200": LanguageRecipe(
        scale="h200",
        corpus=PYTHON_STDLIB,
        variants=_decoders(_VARIANTS, _H200),
        contrasts=_decoders(_CONTRASTS, _H200),
        readings=_READINGS,
        sweep=RateSweep(
            (2.5e-4, 5e-4, 1e-3, 2e-3),
            TrainingConfig(steps=200, batch_size=16, warmup_steps=20, precision="bf16"),
            windows=64,
        ),
        training=TrainingConfig(
            steps=1500,  # 24.6e6 tokens in batches of 16 windows of 1024
            batch_size=16,
            warmup_steps=100,
            log_every=25,
            evaluate_every=100,
            checkpoint_every=250,
            precision="bf16",
        ),
        seeds=(0, 1, 2, 3, 4),
        length_factors=_FACTORS,
        curve_windows=16,
        sink_windows=16,
        sink_bins=16,
        probe_windows=4,
    ),
    "paper": LanguageRecipe(
        scale="paper",
        corpus="c4",
        variants=_decoders(_VARIANTS, _PAPER),
        contrasts=_decoders(_CONTRASTS, _PAPER),
        readings=_READINGS,
        sweep=RateSweep(
            (3e-4, 6e-4, 1.2e-3),
            TrainingConfig(steps=500, batch_size=128, accumulation=4, warmup_steps=100, precision="bf16"),
            windows=256,
        ),
        training=TrainingConfig(
            steps=15_259,  # 4e9 tokens in batches of 128 windows of 2048
            batch_size=128,
            accumulation=4,
            warmup_steps=400,
            log_every=50,
            evaluate_every=500,
            checkpoint_every=500,
            precision="bf16",
        ),
        seeds=(0,),
        length_factors=_FACTORS,
        curve_windows=64,
        sink_windows=16,
        sink_bins=16,
        probe_windows=4,
    ),
}
