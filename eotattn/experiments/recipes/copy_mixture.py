"""Figure 1's recipe at every scale."""

from __future__ import annotations

from dataclasses import dataclass

from eotattn.experiments.networks import CopyReaderConfig
from eotattn.experiments.scales import check_scale
from eotattn.experiments.tasks import CopyMixture
from eotattn.experiments.training import TrainingConfig

__all__ = ["CopyMixtureRecipe", "copy_mixture"]


@dataclass(frozen=True)
class CopyMixtureRecipe:
    """Figure 1.

    Args:
        scale: Name of the scale.
        task: The data.
        network: The reader.
        training: The run, once a seed.
        seeds: Seeds of weights and batches.
        test_sequences: Fresh sequences that the final loss is measured on.
    """

    scale: str
    task: CopyMixture
    network: CopyReaderConfig
    training: TrainingConfig
    seeds: tuple[int, ...]
    test_sequences: int


def copy_mixture(scale: str = "laptop") -> CopyMixtureRecipe:
    """Figure 1 at a scale. The paper gives no sizes for it, so ``"paper"`` and ``"h200"`` are the same longer run.

    The planted relative part is a spike, whose spectrum is flat. Keys without use get hardly any gradient, so what the
    learned part looks like there is left to the waves: short periods, close enough together that they do not align
    again within the window, leave it flat. Periods up to the window's length would give a broad bump that predicts as
    well. For the same reason the warm-up is long and the content learns fast: a prior that moves before tokens can be
    read follows noise, and a key that noise has pushed away comes back slowly.

    Example:
        >>> copy_mixture("laptop").task.length
        32
    """
    check_scale("copy_mixture", scale)
    length = 16 if scale == "smoke" else 32
    steps = {"smoke": 60, "laptop": 800}.get(scale, 3000)
    task = CopyMixture(vocabulary_size=16, length=length, first_probability=0.4, previous_probability=0.4)
    network = CopyReaderConfig(
        vocabulary_size=task.vocabulary_size,
        embed_dim=32,
        num_heads=1,
        num_frequencies=length,
        min_period=2.05,
        max_period=8.0,
        length_scale=float(length),
    )
    training = TrainingConfig(
        steps=steps,
        batch_size=64 if scale in ("smoke", "laptop") else 512,
        learning_rate=1e-2,
        prior_learning_rate=3e-2,
        warmup_steps=steps // 4,
        weight_decay=0.0,
        log_every=max(1, steps // 20),
        evaluate_every=max(1, steps // 20),
    )
    return CopyMixtureRecipe(
        scale, task, network, training, seeds=(0, 1, 2), test_sequences=64 if scale == "smoke" else 4096
    )
