"""Figure 5's recipe at every scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eotattn.experiments.networks import VisionConfig
from eotattn.experiments.scales import check_scale
from eotattn.experiments.tasks.images import DIGITS
from eotattn.experiments.training import TrainingConfig

__all__ = ["VisionRecipe", "vision"]


@dataclass(frozen=True)
class VisionRecipe:
    """Figure 5.

    Args:
        scale: Name of the scale.
        corpus: As in :func:`eotattn.experiments.tasks.open_images`.
        sizes: Rows and columns of the images, pixels: of training, then those that are evaluated as well.
        max_shift: Pixels by which training images are shifted at random.
        variants: One transformer a curve; equal but for the positions.
        training: The run, once a variant, seed and learning rate.
        prior_rate_factor: Learning rate of log-priors over that of the rest.
        learning_rates: Rates that all seeds train every variant at; the one with the least mean loss on validation
            images counts.
        seeds: Seeds of weights and batches.
    """

    scale: str
    corpus: str
    sizes: tuple[int, ...]
    max_shift: int
    variants: tuple[VisionConfig, ...]
    training: TrainingConfig
    prior_rate_factor: float
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]

    @property
    def sweep_seeds(self) -> tuple[int, ...]:
        """All seeds try the rates: a tenth of the digits are 179 images, too few for one seed to choose by."""
        return self.seeds


def vision(scale: str = "laptop") -> VisionRecipe:
    """Figure 5 at a scale: handwritten digits of 8 x 8 pixels, at ``"h200"`` interpolated to 16 for a finer grid.

    ``"paper"`` has the paper's resolutions and frequencies on a folder ``imagenet`` of one folder a class, which the
    user provides; the paper does not say how long it trains.

    Example:
        >>> vision("laptop").sizes
        (8, 16, 24)
    """
    return _VISION[check_scale("vision", scale)]


def _transformers(train_size: int, patch_size: int, sizes: Mapping[str, int]) -> tuple[VisionConfig, ...]:
    """Equal transformers with the three kinds of positions; waves from 2.5 patches to four times the image."""
    grid = train_size // patch_size
    return tuple(
        VisionConfig(
            name,
            patch_size=patch_size,
            train_grid=grid,
            num_frequencies=16,
            num_key_frequencies=2,
            min_period=2.5,
            max_period=4.0 * grid,
            **sizes,  # type: ignore[arg-type]
        )
        for name in ("goat", "learned", "sinusoidal")
    )


_VISION = {
    "smoke": VisionRecipe(
        scale="smoke",
        corpus=DIGITS,
        sizes=(8, 16, 24),
        max_shift=1,
        variants=_transformers(8, 2, {"num_classes": 10, "num_layers": 2, "embed_dim": 16, "num_heads": 2}),
        training=TrainingConfig(steps=4, batch_size=8, warmup_steps=1, log_every=2),
        prior_rate_factor=10.0,
        learning_rates=(1e-3, 3e-3),
        seeds=(0, 1),
    ),
    "laptop": VisionRecipe(
        scale="laptop",
        corpus=DIGITS,
        sizes=(8, 16, 24),
        max_shift=1,
        variants=_transformers(8, 2, {"num_classes": 10, "num_layers": 3, "embed_dim": 48, "num_heads": 4}),
        training=TrainingConfig(steps=600, batch_size=32, warmup_steps=50, log_every=20, checkpoint_every=300),
        prior_rate_factor=10.0,
        learning_rates=(1e-3, 3e-3, 1e-2),
        seeds=(0, 1, 2),
    ),
    "h200": VisionRecipe(
        scale="h200",
        corpus=DIGITS,
        sizes=(16, 32, 48),
        max_shift=2,
        variants=_transformers(16, 2, {"num_classes": 10, "num_layers": 3, "embed_dim": 96, "num_heads": 4}),
        training=TrainingConfig(steps=800, batch_size=128, warmup_steps=80, log_every=40),
        prior_rate_factor=10.0,
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 2e-2),
        seeds=(0, 1, 2),
    ),
    "paper": VisionRecipe(
        scale="paper",
        corpus="imagenet",
        sizes=(224, 384, 512),
        max_shift=16,
        variants=_transformers(
            224, 16, {"num_classes": 1000, "channels": 3, "num_layers": 12, "embed_dim": 384, "num_heads": 6}
        ),
        training=TrainingConfig(
            steps=112_000,  # 90 epochs
            batch_size=1024,
            warmup_steps=5000,
            compile=True,
            precision="bf16",
            log_every=50,
            checkpoint_every=1000,
        ),
        prior_rate_factor=10.0,
        learning_rates=(2.5e-4, 5e-4, 1e-3),
        seeds=(0, 1, 2),
    ),
}
