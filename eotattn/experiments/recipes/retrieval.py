"""Figure 3's recipe at every scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from eotattn.experiments.networks import DecoderConfig
from eotattn.experiments.scales import check_scale
from eotattn.experiments.tasks import RetrievalTask
from eotattn.experiments.tasks.retrieval import ALPHABET
from eotattn.experiments.training import TrainingConfig

__all__ = ["RetrievalRecipe", "retrieval"]

#: Decoders of the figure, in the order of legends.
VARIANTS = ("goat", "paper_goat", "alibi", "rope", "interpolated_rope", "ntk_rope", "sinusoidal")


@dataclass(frozen=True)
class RetrievalRecipe:
    """Figure 3.

    Args:
        scale: Name of the scale.
        task: The data; passkeys and needles take turns in every batch.
        variants: One decoder a curve; equal but for the attention.
        training: The run, once a seed and variant that trains, at the best rate; two kinds of scaled RoPE read the
            weights of RoPE.
        learning_rates: Rates that the first seed trains every variant at; the others take the one with the least
            training loss.
        seeds: Seeds of weights and batches.
        repeated: Variants that run with every seed; the others, for contrast, run with the first alone.
        length_factors: Examined contexts as multiples of the training length.
        depths: Examined depths, 0 to 1.
        count: Sequences examined a task, length and depth.
    """

    scale: str
    task: RetrievalTask
    variants: tuple[DecoderConfig, ...]
    training: TrainingConfig
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    repeated: tuple[str, ...]
    length_factors: tuple[int, ...]
    depths: tuple[float, ...]
    count: int

    @property
    def sweep_seeds(self) -> tuple[int, ...]:
        """The first seed tries the rates."""
        return self.seeds[:1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Examined contexts, tokens."""
        return tuple(factor * self.task.length for factor in self.length_factors)

    def seeds_of(self, variant: str) -> tuple[int, ...]:
        """Seeds that a variant runs with."""
        return self.seeds if variant in self.repeated else self.seeds[:1]


def retrieval(scale: str = "laptop") -> RetrievalRecipe:
    """Figure 3 at a scale.

    ``"h200"`` and ``"paper"`` have the paper's decoder, steps, batch, training length and frequencies. There one
    network learns both tasks, half a batch each, where the paper trains one a task; ``"h200"`` tries
    rates from half of the paper's to four times that.

    Example:
        >>> retrieval("laptop").lengths
        (64, 128, 256, 512, 1024)
    """
    check_scale("retrieval", scale)
    is_small = scale in ("smoke", "laptop")
    length = 64 if is_small else 256
    small: dict[str, Any] = {"num_layers": 2, "embed_dim": 64, "num_heads": 4}
    sizes = small if is_small else _PAPER_SIZES
    variants = tuple(
        DecoderConfig(
            name,
            vocabulary_size=len(ALPHABET),
            **sizes,
            train_length=length,
            num_frequencies=8,
            min_period=2 * math.pi,
            max_period=2 * math.pi * 10_000,
        )
        for name in VARIANTS
    )
    return RetrievalRecipe(
        scale=scale,
        task=RetrievalTask(length),
        variants=variants,
        training=_TRAINING[scale],
        learning_rates=_RATES[scale],
        seeds=(0,) if is_small else (0, 1, 2),
        repeated=("goat", "paper_goat", "alibi"),
        length_factors={"smoke": (1, 2), "laptop": (1, 2, 4, 8, 16)}.get(scale, (1, 2, 4, 8, 16, 32)),
        depths=(0.1, 0.9) if scale == "smoke" else (0.1, 0.3, 0.5, 0.7, 0.9),
        count={"smoke": 4}.get(scale, 32),
    )


_PAPER_SIZES = {"num_layers": 12, "embed_dim": 512, "num_heads": 8}

_PAPER_TRAINING = TrainingConfig(
    steps=2000, batch_size=32, warmup_steps=400, log_every=50, checkpoint_every=500, precision="bf16"
)

_TRAINING = {
    "h200": _PAPER_TRAINING,
    "paper": _PAPER_TRAINING,
    "smoke": TrainingConfig(steps=4, batch_size=4, warmup_steps=1, log_every=2),
    "laptop": TrainingConfig(steps=1200, batch_size=32, warmup_steps=100, log_every=50, checkpoint_every=400),
}

_RATES = {"smoke": (1e-3, 3e-3), "laptop": (3e-3,), "h200": (1.5e-4, 3e-4, 6e-4, 1.2e-3), "paper": (3e-4,)}
