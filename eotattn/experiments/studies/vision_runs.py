"""The runs behind figure 5: vision transformers trained at one resolution and evaluated at others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from eotattn.experiments.grid_prior_parts import describe_grid_log_prior, grid_log_prior
from eotattn.experiments.networks import VisionConfig, VisionTransformer
from eotattn.experiments.networks.vision import POSITION_UNITS
from eotattn.experiments.rate_sweep import run_name, swept_runs
from eotattn.experiments.recipes.vision import VisionRecipe
from eotattn.experiments.records import Measurement, Records, Row, Run
from eotattn.experiments.tasks import ImageTask, open_images
from eotattn.experiments.training import TrainingConfig, train, training_rows

__all__ = ["VisionRun", "evaluate_images", "measure", "runs", "units_of"]

#: Images of a forward pass at the training resolution; fewer at higher ones.
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class VisionRun:
    """One transformer, trained and measured.

    Args:
        corpus: As in :func:`~eotattn.experiments.tasks.open_images`.
        max_shift: Pixels by which training images are shifted.
        network: The transformer.
        training: The run.
        sizes: Resolutions to evaluate at, pixels, the training resolution first.
    """

    corpus: str
    max_shift: int
    network: VisionConfig
    training: TrainingConfig
    sizes: tuple[int, ...]

    @property
    def seed(self) -> int:
        """Seed of weights and batches."""
        return self.training.seed


def runs(recipe: VisionRecipe, records: Records) -> list[Run]:
    """One run a seed, variant and rate."""
    found = []
    for seed, positions, rate in swept_runs(recipe, records, [network.positions for network in recipe.variants]):
        training = recipe.training.at(rate, seed=seed, prior_rate_factor=recipe.prior_rate_factor)
        (network,) = [one for one in recipe.variants if one.positions == positions]
        run = VisionRun(recipe.corpus, recipe.max_shift, network, training, recipe.sizes)
        found.append(Run(run_name(positions, rate, seed), run, measure))
    return found


def units_of(variant: str, size: int, train_size: int) -> tuple[str, ...]:
    """Units of positions that make a difference: both for fixed waves beyond the training resolution."""
    has_units = variant in ("goat", "sinusoidal") and size != train_size
    return POSITION_UNITS if has_units else POSITION_UNITS[-1:]


def measure(run: VisionRun, checkpoint: Path) -> Measurement:
    """Train a transformer, classify the held-out images at every resolution, and read its log-prior.

    Args:
        run: What to do.
        checkpoint: File of the unfinished training.
    """
    task = ImageTask(open_images(run.corpus), size=run.sizes[0], max_shift=run.max_shift)
    network = VisionTransformer(run.network)
    variant = run.network.positions
    training = train(network, task, run.training, label=f"{variant}, seed {run.seed}", checkpoint=checkpoint)
    rows = training_rows(training)
    (unit,) = units_of(variant, run.sizes[0], run.sizes[0])
    _, loss = evaluate_images(network, task, run.sizes[0], unit, part="validation")
    rows.append(loss | {"panel": "training", "quantity": "choice_loss"})
    for size in run.sizes:
        for unit in units_of(variant, size, run.sizes[0]):
            rows += evaluate_images(network, task, size, unit)
    count = sum(p.numel() for p in network.parameters())
    rows.append({"panel": "training", "quantity": "parameters", "unit": "count", "value": count})
    seconds = training.wall_seconds
    rows.append({"panel": "training", "quantity": "training_seconds", "unit": "seconds", "value": seconds})
    accuracies = [f"{r['value']:.3f} at {r['size']} ({r['positions']})" for r in rows if r["quantity"] == "accuracy"]
    return Measurement(rows, _prior_arrays(network), summary="accuracy " + ", ".join(accuracies))


@torch.no_grad()
def evaluate_images(
    network: VisionTransformer, task: ImageTask, size: int, unit: str, *, part: str = "held_out"
) -> list[Row]:
    """Accuracy and loss on all images of a part at a resolution.

    Args:
        network: In evaluation mode.
        task: The images.
        size: Rows and columns, pixels.
        unit: A name in :data:`~eotattn.experiments.networks.vision.POSITION_UNITS`.
        part: As in :meth:`ImageTask.indices`.
    """
    device = next(network.parameters()).device
    batch_size = max(1, EVALUATION_BATCH * task.size**2 // size**2)
    right, loss, count = 0, 0.0, 0
    for batch in task.batches_of(part, size, batch_size):
        logits, labels = network(batch.inputs.to(device), unit=unit).float(), batch.targets.to(device)
        right += int((logits.argmax(-1) == labels).sum())
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    place: Row = {"panel": "a", "size": size, "positions": unit}
    return [
        place | {"quantity": "accuracy", "unit": "fraction", "value": right / count},
        place | {"quantity": "loss", "unit": "nats per image", "value": loss / count},
    ]


def _prior_arrays(network: VisionTransformer) -> dict[str, NDArray[Any]]:
    """What the learned log-prior of every block but the last looks like; nothing for other positions.

    Of the last block only the class token is read out, which lies nowhere: its log-prior on the grid is never used.
    """
    grid = network.config.train_grid
    parts = [describe_grid_log_prior(grid_log_prior(prior.parts[0], grid), grid) for prior in network.priors[:-1]]
    names = ("lag_map", "strength", "shift_invariance", "distance_ratio") if parts else ()
    return {name: np.stack([getattr(part, name).numpy() for part in parts]) for name in names}
