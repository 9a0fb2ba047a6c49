"""Figure 4: DNA. Which decoder predicts the next base better, keeps the GC content of its prompt, and trains faster?

Recipe and runs. Legend: N windows, L tokens, P prompts, W windows of a GC trajectory.
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
from eotattn.experiments.rate_sweep import swept_runs
from eotattn.experiments.records import Measurement, Records, Row, Run, TrainedRun, taken_from
from eotattn.experiments.sampling import sample_continuations
from eotattn.experiments.scales import check_scale
from eotattn.experiments.study import Figure
from eotattn.experiments.tasks import DnaTask, IsochoreGenome, IsochoreModel, StoredGenome, gc_fraction
from eotattn.experiments.training import TrainingConfig, TrainingResult, train, training_rows
from eotattn.experiments.training_speed import measure_training_speed, speed_variants

__all__ = ["FIGURE", "DnaRecipe", "choose", "correlation", "measure", "recipe", "runs", "window_losses"]

#: Held-out window whose GC trajectory is drawn: the first, not a chosen one.
SHOWN_PROMPT = 0
#: Validation windows that the validation curve and the choice of the rate read.
VALIDATION_WINDOWS = 64

# Recipe -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationConfig:
    """Of ``prompts`` held-out windows the first half is the prompt; GC content is read in windows of ``gc_window``."""

    prompts: int
    gc_window: int


@dataclass(frozen=True)
class SpeedConfig:
    """How training is timed: ``rounds`` steps of each variant, in turn; also with compiled blocks if ``compile``."""

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
        learning_rates: Rates that the first seed trains every variant at; all seeds take the one with the least
            validation loss.
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


def _decoders(*sizes: int, names: tuple[str, ...] = ("rope", "paper_goat", "goat")) -> tuple[DecoderConfig, ...]:
    """Decoders of bases with two frequencies, 1 and 1 / 10 000 radians a base."""
    base: dict[str, Any] = {"num_frequencies": 2, "min_period": 2 * math.pi, "max_period": 2 * math.pi * 10_000}
    layers, width, heads, length = sizes
    return tuple(DecoderConfig(name, 5, layers, width, heads, length, **base) for name in names)


def _speed(*sizes: int, **options: Any) -> SpeedConfig:
    return SpeedConfig(_decoders(*sizes, names=("rope",))[0], **options)


#: Repeats that a small decoder learns within minutes, one family, short and little worn; isochores that differ so much
#: that a short prompt tells them apart.
SMALL_GENOME = IsochoreModel(
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
GENOME = IsochoreModel(
    gc_fractions=(0.33, 0.38, 0.43, 0.5, 0.58), class_shares=(0.2, 0.3, 0.25, 0.15, 0.1), family_length=64
)

RECIPES = {
    "smoke": DnaRecipe(
        scale="smoke",
        genome=IsochoreGenome(IsochoreModel(), num_blocks=16, block_length=128, num_held_out=8),
        variants=_decoders(1, 16, 2, 32),
        training=TrainingConfig(steps=4, batch_size=4, warmup_steps=1, log_every=2, evaluate_every=2),
        learning_rates=(1e-3, 3e-3),
        seeds=(0, 1),
        test_windows=8,
        generation=GenerationConfig(prompts=4, gc_window=8),
        speed=_speed(1, 16, 2, 32, batch_size=2, rounds=2, precision="no", compile=False),
    ),
    "laptop": DnaRecipe(
        scale="laptop",
        genome=IsochoreGenome(SMALL_GENOME, num_blocks=2048, block_length=1024, num_held_out=128),
        variants=_decoders(2, 64, 4, 256),
        training=TrainingConfig(
            steps=300, batch_size=16, warmup_steps=30, log_every=20, evaluate_every=50, checkpoint_every=100
        ),
        learning_rates=(3e-3, 6e-3, 1.2e-2),
        seeds=(0, 1, 2),
        test_windows=128,
        generation=GenerationConfig(prompts=128, gc_window=64),
        speed=_speed(2, 64, 4, 256, batch_size=16, rounds=8, precision="no", compile=False),
    ),
    "h200": DnaRecipe(
        scale="h200",
        genome=IsochoreGenome(GENOME, num_blocks=8192, block_length=2048, num_held_out=256),
        variants=_decoders(6, 384, 6, 1024, names=("rope", "paper_goat", "goat", "fast_goat")),
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
        speed=_speed(6, 768, 12, 1024, batch_size=64, rounds=10, precision="bf16", compile=True),
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
        speed=_speed(12, 768, 12, 1024, batch_size=16, rounds=20, precision="bf16", compile=True),
    ),
}


def recipe(scale: str = "laptop") -> DnaRecipe:
    """Figure 4 at a scale: the paper's tokens and frequencies; an artificial genome, at ``"paper"`` the human one.

    The paper does not say how large its decoder is; ``"paper"`` takes that of figure 2, on windows of 1024.

    Example:
        >>> recipe("h200").length
        1024
    """
    return RECIPES[check_scale("dna", scale)]


# Runs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DnaRun(TrainedRun):
    """One decoder, trained and measured; fields as in :class:`DnaRecipe`."""

    genome: IsochoreGenome | StoredGenome
    network: DecoderConfig
    training: TrainingConfig
    test_windows: int
    generation: GenerationConfig


@dataclass(frozen=True)
class GeneratorRun:
    """What the artificial genome's own generator reaches: the floor of the loss, the ceiling of GC correlation."""

    genome: IsochoreGenome
    length: int
    test_windows: int
    generation: GenerationConfig
    seed: int = 0


def runs(recipe: DnaRecipe, records: Records) -> list[Run]:
    """The timing, the choosing runs, then every variant at its rate; and the generator, where there is one."""
    decoders = {decoder.attention: decoder for decoder in recipe.variants}

    def configure(name: str, rate: float, seed: int) -> DnaRun:
        factor = decoders[name].kind.prior_rate_factor
        training = recipe.training.at(rate, seed=seed, prior_rate_factor=factor)
        return taken_from(recipe, DnaRun, network=decoders[name], training=training)

    found = [Run("speed", recipe.speed, measure_speed)]
    if isinstance(recipe.genome, IsochoreGenome):
        found.append(Run("generator", taken_from(recipe, GeneratorRun, seed=0), measure_generator))
    return found + swept_runs(recipe, records, dict.fromkeys(decoders, recipe.seeds), configure, choose, measure)


FIGURE = Figure("fig4_dna", recipe, runs)


def choose(run: DnaRun, checkpoint: Path) -> Measurement:
    """Train a decoder; its loss on validation windows judges its rate."""
    _, task, training = _train(run, checkpoint)
    loss = training.evaluations[-1]["loss"]
    rows = [*training_rows(training), _row("training", "choice_loss", "nats per base", loss)]
    return Measurement(_of(run, rows), summary=f"{loss:.4f} nats a base, validation", data=task.fingerprint)


def measure(run: DnaRun, checkpoint: Path) -> Measurement:
    """Train a decoder, measure its likelihood on held-out windows and sample continuations."""
    network, task, training = _train(run, checkpoint)
    windows = task.held_out_windows(task.length, run.test_windows)
    losses = window_losses(network, windows)
    rows = training_rows(training)
    rows += [_row("a", "validation_loss", "nats per base", r["loss"], step=r["step"]) for r in training.evaluations]
    rows.append(_row("training", "training_seconds", "seconds", training.wall_seconds))
    rows.append(_row("training", "parameters", "count", sum(p.numel() for p in network.parameters())))
    prompts, half = windows[: run.generation.prompts], task.length // 2
    sampled = sample_continuations(network, prompts[:, :half], half, seed=run.seed, num_tokens=4)  # all bases but N
    rows += _loss_rows(losses) + _gc_rows(prompts, sampled, run.generation.gc_window)
    return Measurement(_of(run, rows), summary=f"{float(losses.mean()):.4f} nats a base", data=task.fingerprint)


def _train(run: DnaRun, checkpoint: Path) -> tuple[Decoder, DnaTask, TrainingResult]:
    """A decoder, watched on validation windows."""
    task = run.genome.task(run.network.train_length)
    count = min(VALIDATION_WINDOWS, run.test_windows)
    windows = task.validation_windows(task.length, count)
    network = Decoder(run.network)

    def validate(network: torch.nn.Module, step: int) -> list[Row]:
        return [{"loss": float(window_losses(network, windows).mean())}]

    label = f"{run.network.attention}, seed {run.seed}"
    return network, task, train(network, task, run.training, label=label, evaluate=validate, checkpoint=checkpoint)


def _of(run: DnaRun, rows: list[Row]) -> list[Row]:
    return [{"variant": run.network.attention} | row for row in rows]


def _row(panel: str, quantity: str, unit: str, value: float, **where: float) -> Row:
    return {"panel": panel, "quantity": quantity, "unit": unit, "value": value} | where


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


def _loss_rows(losses: Tensor) -> list[Row]:
    """The mean of (N, L) losses, and the mean of every window and position."""
    rows = [_row("b", "loss", "nats per base", float(losses.mean()))]
    rows.append(_row("b", "bits_per_base", "bits", float(losses.mean()) / math.log(2)))
    rows += [_row("b", "window_loss", "nats per base", float(x), window=n) for n, x in enumerate(losses.mean(1))]
    each = enumerate(losses.mean(0), 1)
    return rows + [_row("c", "loss_at_position", "nats per base", float(x), position=t) for t, x in each]


def _gc_rows(windows: Tensor, sampled: Tensor, gc_window: int) -> list[Row]:
    """GC fractions of one prompt and its continuations, and how well the sampled ones follow the true ones."""
    half = sampled.shape[1]
    parts = {"prompt": windows[:, :half], "true": windows[:, half : 2 * half], "sampled": sampled.long()}
    fractions = {name: gc_fraction(part, gc_window).numpy() for name, part in parts.items()}
    rows = [
        _row("d", f"gc_{name}", "fraction", float(value), prompt=SHOWN_PROMPT, window=w)
        for name, found in fractions.items()
        for w, value in enumerate(found[SHOWN_PROMPT])
    ]
    followed = correlation(fractions["sampled"], fractions["true"])
    return [*rows, _row("e", "gc_correlation", "dimensionless", followed)]


def correlation(sampled: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    """Pearson correlation of GC fractions over all windows of all prompts that know a base in both."""
    known = np.isfinite(sampled) & np.isfinite(true)
    varied = known.sum() > 1 and sampled[known].std() > 0 and true[known].std() > 0
    return float(np.corrcoef(sampled[known], true[known])[0, 1]) if varied else math.nan


def measure_generator(run: GeneratorRun, checkpoint: Path) -> Measurement:
    """The exact likelihood of the decoders' held-out windows, and continuations from the true distribution."""
    windows = run.genome.task(run.length).held_out_windows(run.length, run.test_windows)
    losses = run.genome.model.surprisal(windows)[:, 1:]
    prompts, half = windows[: run.generation.prompts], run.length // 2
    sampled = run.genome.model.continuations(prompts[:, :half], half, seed=run.seed)
    rows = _loss_rows(losses) + _gc_rows(prompts, sampled, run.generation.gc_window)
    rows = [{"variant": "generator"} | row for row in rows]
    return Measurement(rows, summary=f"{float(losses.mean()):.4f} nats a base")


def measure_speed(run: SpeedConfig, checkpoint: Path) -> Measurement:
    """Time training steps; to be run alone on its device."""
    variants, sizes = speed_variants(compiled=run.compile), {"batch_size": run.batch_size, "rounds": run.rounds}
    rows = measure_training_speed(variants, run.network, **sizes, precision=run.precision)
    found = [f"{row['variant']} {row['value']:.0f} tokens/s" for row in rows if row["quantity"] == "throughput"]
    return Measurement(rows, summary="; ".join(found))
