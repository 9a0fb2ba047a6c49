"""The runs behind figure 4: decoders of DNA, the generator's own likelihood, and the timing of training steps.

Legend: N windows, L tokens, P prompts, W windows of a GC trajectory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from eotattn.experiments.networks import Decoder, DecoderConfig
from eotattn.experiments.rate_sweep import run_name, swept_runs
from eotattn.experiments.recipes.dna import DnaRecipe, GenerationConfig, SpeedConfig
from eotattn.experiments.records import Measurement, Records, Row, Run
from eotattn.experiments.sampling import sample_continuations
from eotattn.experiments.tasks import IsochoreGenome, StoredGenome, gc_fraction
from eotattn.experiments.training import TrainingConfig, train, training_rows
from eotattn.experiments.training_speed import measure_training_speed, speed_variants

__all__ = ["DnaRun", "GeneratorRun", "measure", "measure_generator", "measure_speed", "runs", "window_losses"]

#: Bases that are drawn: all but N.
NUM_BASES = 4
#: Held-out windows that the validation curve reads during training.
VALIDATION_WINDOWS = 64


@dataclass(frozen=True)
class DnaRun:
    """One decoder, trained and measured.

    Args:
        genome: The data.
        network: The decoder.
        training: The run.
        test_windows: Held-out windows behind the likelihood.
        generation: Continuations.
    """

    genome: IsochoreGenome | StoredGenome
    network: DecoderConfig
    training: TrainingConfig
    test_windows: int
    generation: GenerationConfig

    @property
    def seed(self) -> int:
        """Seed of weights, batches and draws."""
        return self.training.seed


@dataclass(frozen=True)
class GeneratorRun:
    """What the artificial genome's own generator reaches: the floor of the loss, and the ceiling of GC correlation.

    Args:
        genome: The data.
        length: Tokens of a window.
        test_windows: The decoders' held-out windows.
        generation: Their prompts.
        seed: Seed of the draws.
    """

    genome: IsochoreGenome
    length: int
    test_windows: int
    generation: GenerationConfig
    seed: int = 0


def runs(recipe: DnaRecipe, records: Records) -> list[Run]:
    """The generator, the timing, and for every variant one run a rate with the first seed, then the other seeds."""
    found = [Run("speed", recipe.speed, measure_speed)]
    if isinstance(recipe.genome, IsochoreGenome):
        generator = GeneratorRun(recipe.genome, recipe.length, recipe.test_windows, recipe.generation)
        found.append(Run("generator", generator, measure_generator))
    for seed, network, rate in swept_runs(recipe, records, [network.attention for network in recipe.variants]):
        (decoder,) = [one for one in recipe.variants if one.attention == network]
        training = recipe.training.at(rate, seed=seed, prior_rate_factor=decoder.kind.prior_rate_factor)
        run = DnaRun(recipe.genome, decoder, training, recipe.test_windows, recipe.generation)
        found.append(Run(run_name(network, rate, seed), run, measure))
    return found


# Measuring ----------------------------------------------------------------------------------------------------------


def measure(run: DnaRun, checkpoint: Path) -> Measurement:
    """Train a decoder, measure its likelihood on held-out windows and sample continuations.

    Args:
        run: What to do.
        checkpoint: File of the unfinished training.
    """
    length = run.network.train_length
    task = run.genome.task(length)
    windows = task.held_out_windows(length, run.test_windows)
    network = Decoder(run.network)

    def validate(network: torch.nn.Module, step: int) -> list[Row]:
        return [{"loss": float(window_losses(network, windows[:VALIDATION_WINDOWS]).mean())}]

    label = f"{run.network.attention}, seed {run.seed}"
    training = train(network, task, run.training, label=label, evaluate=validate, checkpoint=checkpoint)
    losses = window_losses(network, windows)
    rows = training_rows(training)
    rows += [_row("a", "validation_loss", "nats per base", r["loss"], step=r["step"]) for r in training.evaluations]
    rows.append(_row("b", "loss", "nats per base", float(losses.mean())))
    rows.append(_row("b", "bits_per_base", "bits", float(losses.mean()) / math.log(2)))
    rows.append(_row("training", "training_seconds", "seconds", training.wall_seconds))
    rows.append(_row("training", "parameters", "count", sum(p.numel() for p in network.parameters())))
    arrays: dict[str, NDArray[Any]] = {"window_loss": losses.mean(1).numpy(), "position_loss": losses.mean(0).numpy()}
    prompts = windows[: run.generation.prompts]
    trajectories = _trajectories(prompts, _continuations(network, prompts, run.seed), run.generation.gc_window)
    return Measurement(rows, arrays | trajectories, summary=f"{float(losses.mean()):.4f} nats a base")


@torch.no_grad()
def window_losses(network: torch.nn.Module, windows: Tensor, *, batch_tokens: int = 65_536) -> Tensor:
    """(N, L) float64 negative log-likelihood of every base but the first of (N, L + 1) windows, nats."""
    device = next(network.parameters()).device
    found = []
    for part in windows.split(max(1, batch_tokens // windows.shape[1])):
        tokens = part.to(device)
        logits = network(tokens[:, :-1]).float()
        found.append(functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").double().cpu())
    return torch.cat(found)


def _continuations(network: Decoder, windows: Tensor, seed: int) -> Tensor:
    """What the network puts in place of the second half of the windows."""
    half = (windows.shape[1] - 1) // 2
    return sample_continuations(network, windows[:, :half], half, seed=seed, num_tokens=NUM_BASES)


def _trajectories(windows: Tensor, sampled: Tensor, gc_window: int) -> dict[str, NDArray[np.float64]]:
    """GC fraction of prompts, true and sampled continuations, each (P, W)."""
    half = sampled.shape[1]
    parts = {"prompt": windows[:, :half], "true": windows[:, half : 2 * half], "sampled": sampled}
    return {f"gc_{name}": gc_fraction(part, gc_window).numpy() for name, part in parts.items()}


def measure_generator(run: GeneratorRun, checkpoint: Path) -> Measurement:
    """The exact likelihood of the decoders' held-out windows, and continuations from the true distribution."""
    windows = run.genome.task(run.length).held_out_windows(run.length, run.test_windows)
    losses = run.genome.model.surprisal(windows)[:, 1:]
    prompts = windows[: run.generation.prompts]
    half = (windows.shape[1] - 1) // 2
    sampled = run.genome.model.continuations(prompts[:, :half], half, seed=run.seed)
    arrays = {"window_loss": losses.mean(1).numpy(), "position_loss": losses.mean(0).numpy()}
    rows = [_row("b", "loss", "nats per base", float(losses.mean()))]
    rows.append(_row("b", "bits_per_base", "bits", float(losses.mean()) / math.log(2)))
    trajectories = _trajectories(prompts, sampled.long(), run.generation.gc_window)
    return Measurement(rows, arrays | trajectories, summary=f"{float(losses.mean()):.4f} nats a base")


def measure_speed(run: SpeedConfig, checkpoint: Path) -> Measurement:
    """Time training steps; to be run alone on its device."""
    rows = measure_training_speed(
        speed_variants(compiled=run.compile),
        run.network,
        batch_size=run.batch_size,
        rounds=run.rounds,
        precision=run.precision,
    )
    found = [row for row in rows if row["quantity"] == "throughput"]
    return Measurement(rows, summary="; ".join(f"{row['variant']} {row['value']:.0f} tokens/s" for row in found))


def _row(panel: str, quantity: str, unit: str, value: float, **where: float) -> Row:
    return {"panel": panel, "quantity": quantity, "unit": unit, "value": value} | where
