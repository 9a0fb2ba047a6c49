"""Figure 4's recipe at every scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eotattn.experiments.networks import DecoderConfig
from eotattn.experiments.scales import check_scale
from eotattn.experiments.tasks import IsochoreGenome, IsochoreModel, StoredGenome
from eotattn.experiments.training import TrainingConfig

__all__ = ["DnaRecipe", "GenerationConfig", "SpeedConfig", "dna"]


@dataclass(frozen=True)
class GenerationConfig:
    """How continuations are sampled and read.

    Args:
        prompts: Held-out windows; the first half of each is the prompt, the second half its true continuation.
        gc_window: Bases of a window of the GC trajectory.
    """

    prompts: int
    gc_window: int


@dataclass(frozen=True)
class SpeedConfig:
    """How training is timed.

    Args:
        network: Sizes of the timed decoders; their attention is that of the variant.
        batch_size: Windows a step.
        rounds: Timed steps of each variant, in turn.
        precision: As in :class:`TrainingConfig`.
        compile: Also time variants whose blocks ``torch.compile`` has compiled.
        seed: Of the weights; speed does not depend on it.
    """

    network: DecoderConfig
    batch_size: int
    rounds: int
    precision: str
    compile: bool
    seed: int = 0


@dataclass(frozen=True)
class DnaRecipe:
    """Figure 4.

    Args:
        scale: Name of the scale.
        genome: The data.
        variants: One decoder a curve; equal but for the attention.
        training: The run, once a variant and seed, at the best learning rate.
        learning_rates: Rates that the first seed trains every variant at; the others take the one with the least
            training loss.
        seeds: Seeds of weights and batches.
        test_windows: Held-out windows behind the likelihoods.
        generation: Continuations.
        speed: Time and memory of training.
    """

    scale: str
    genome: IsochoreGenome | StoredGenome
    variants: tuple[DecoderConfig, ...]
    training: TrainingConfig
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    test_windows: int
    generation: GenerationConfig
    speed: SpeedConfig

    @property
    def sweep_seeds(self) -> tuple[int, ...]:
        """The first seed tries the rates."""
        return self.seeds[:1]

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.variants[0].train_length


def dna(scale: str = "laptop") -> DnaRecipe:
    """Figure 4 at a scale: the paper's tokens and frequencies; an artificial genome, at ``"paper"`` the human one.

    The paper does not say how large its decoder is; ``"paper"`` takes that of figure 2, on windows of 1024.

    Example:
        >>> dna("h200").length
        1024
    """
    return _DNA[check_scale("dna", scale)]


def _decoder(attention: str, num_layers: int, embed_dim: int, num_heads: int, length: int) -> DecoderConfig:
    """A decoder of bases with two frequencies, 1 and 1 / 10 000 radians a base."""
    return DecoderConfig(
        attention,
        vocabulary_size=5,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        train_length=length,
        num_frequencies=2,
        min_period=2 * math.pi,
        max_period=2 * math.pi * 10_000,
    )


def _decoders(*sizes: int, also: tuple[str, ...] = ()) -> tuple[DecoderConfig, ...]:
    return tuple(_decoder(name, *sizes) for name in ("rope", "paper_goat", "goat", *also))


#: Repeats that a small decoder learns within minutes, one family, short and little worn; isochores that differ so much
#: that a short prompt tells them apart.
_SMALL_GENOME = IsochoreModel(
    gc_fractions=(0.3, 0.45, 0.6),
    class_shares=(0.4, 0.35, 0.25),
    periods=(2, 3, 4),
    tandem_share=0.1,
    num_families=1,
    family_length=24,
    element_share=0.3,
    divergence=0.05,
)

#: Within windows of a kilobase GC content varies more than the means of isochores do.
_GENOME = IsochoreModel(
    gc_fractions=(0.33, 0.38, 0.43, 0.5, 0.58), class_shares=(0.2, 0.3, 0.25, 0.15, 0.1), family_length=64
)

_DNA = {
    "smoke": DnaRecipe(
        scale="smoke",
        genome=IsochoreGenome(IsochoreModel(), num_blocks=16, block_length=128, num_held_out=8),
        variants=_decoders(1, 16, 2, 32),
        training=TrainingConfig(steps=4, batch_size=4, warmup_steps=1, log_every=2, evaluate_every=2),
        learning_rates=(1e-3, 3e-3),
        seeds=(0, 1),
        test_windows=8,
        generation=GenerationConfig(prompts=4, gc_window=8),
        speed=SpeedConfig(_decoder("rope", 1, 16, 2, 32), batch_size=2, rounds=2, precision="no", compile=False),
    ),
    "laptop": DnaRecipe(
        scale="laptop",
        genome=IsochoreGenome(_SMALL_GENOME, num_blocks=2048, block_length=1024, num_held_out=128),
        variants=_decoders(2, 64, 4, 256),
        training=TrainingConfig(
            steps=300, batch_size=16, warmup_steps=30, log_every=20, evaluate_every=50, checkpoint_every=100
        ),
        learning_rates=(3e-3, 6e-3, 1.2e-2),
        seeds=(0, 1, 2),
        test_windows=128,
        generation=GenerationConfig(prompts=128, gc_window=64),
        speed=SpeedConfig(_decoder("rope", 2, 64, 4, 256), batch_size=16, rounds=8, precision="no", compile=False),
    ),
    "h200": DnaRecipe(
        scale="h200",
        genome=IsochoreGenome(_GENOME, num_blocks=8192, block_length=2048, num_held_out=256),
        variants=_decoders(6, 384, 6, 1024, also=("fast_goat",)),
        training=TrainingConfig(
            steps=800,
            batch_size=32,
            warmup_steps=80,
            log_every=20,
            evaluate_every=80,
            checkpoint_every=400,
            precision="bf16",
        ),
        learning_rates=(5e-4, 1e-3, 2e-3),
        seeds=(0, 1, 2),
        test_windows=256,
        generation=GenerationConfig(prompts=256, gc_window=128),
        speed=SpeedConfig(_decoder("rope", 6, 768, 12, 1024), batch_size=64, rounds=10, precision="bf16", compile=True),
    ),
    "paper": DnaRecipe(
        scale="paper",
        genome=StoredGenome("hub:GenerTeam/hg38"),
        variants=_decoders(12, 768, 12, 1024),
        training=TrainingConfig(
            steps=20_000,
            batch_size=128,
            warmup_steps=400,
            compile=True,
            precision="bf16",
            log_every=50,
            evaluate_every=500,
            checkpoint_every=500,
        ),
        learning_rates=(3e-4, 6e-4, 1.2e-3),
        seeds=(0, 1, 2),
        test_windows=2048,
        generation=GenerationConfig(prompts=512, gc_window=64),
        speed=SpeedConfig(
            _decoder("rope", 12, 768, 12, 1024), batch_size=16, rounds=20, precision="bf16", compile=True
        ),
    ),
}
