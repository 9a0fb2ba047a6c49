"""Figure 2: how far does a decoder reach beyond its training length, and what does its sink do? Recipe and runs.

Legend: A blocks, H heads, N windows, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from torch import Tensor

from eotattn.diagnostics import sink_mass_by_score_range
from eotattn.experiments.evaluation import sink_observations, target_bits, watch_sinks
from eotattn.experiments.networks import Decoder, DecoderConfig
from eotattn.experiments.prior_parts import key_only_part
from eotattn.experiments.records import Measurement, Records, Row, Run, TrainedRun, taken_from
from eotattn.experiments.scales import check_scale
from eotattn.experiments.study import Figure, as_table, select
from eotattn.experiments.tasks import LanguageTask
from eotattn.experiments.tasks.language import PYTHON_STDLIB
from eotattn.experiments.training import TrainingConfig, autocast, train, training_rows

__all__ = ["FIGURE", "LanguageRecipe", "RateSweep", "at_rate", "best_rate", "judge_rate", "measure", "recipe", "runs"]

# Recipe -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RateSweep:
    """How learning rates are chosen: short runs of the first seed, judged on validation files at the training length.

    The candidates are the same for every swept variant; log-priors train at the rate of the content, but for kinds
    with a factor of their own.
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


VARIANTS = ("rope", "alibi", "paper_goat", "goat", "fast_goat", "local_rotary_goat")
CONTRASTS = ("fast_paper_goat", "none", "sinusoidal")
READINGS = (("interpolated_rope", "rope"), ("ntk_rope", "rope"))


def _decoders(names: tuple[str, ...], sizes: Mapping[str, Any]) -> tuple[DecoderConfig, ...]:
    """Equal decoders, at the paper's frequencies (base 10 000)."""
    base = 2 * math.pi
    return tuple(
        DecoderConfig(name, **sizes, num_frequencies=4, min_period=base, max_period=base * 10_000) for name in names
    )


def _recipe(scale: str, sizes: Mapping[str, Any], **others: Any) -> LanguageRecipe:
    names = {"corpus": PYTHON_STDLIB, "variants": VARIANTS, "contrasts": CONTRASTS, "readings": READINGS}
    parts = names | {"length_factors": (1, 2, 4, 8, 16)} | others
    parts |= {name: _decoders(parts[name], sizes) for name in ("variants", "contrasts")}
    return LanguageRecipe(scale=scale, **parts)


RECIPES = {
    "smoke": _recipe(
        "smoke",
        {"num_layers": 1, "embed_dim": 32, "num_heads": 4, "train_length": 32},
        sweep=RateSweep((3e-3, 1e-2), TrainingConfig(steps=4, batch_size=8, warmup_steps=1), windows=8),
        training=TrainingConfig(steps=20, batch_size=8, warmup_steps=2, log_every=10, evaluate_every=10),
        seeds=(0, 1),
        curve_windows=8,
        sink_windows=8,
        sink_bins=6,
        probe_windows=2,
    ),
    "laptop": _recipe(
        "laptop",
        {"num_layers": 2, "embed_dim": 64, "num_heads": 4, "train_length": 128},
        variants=VARIANTS[:4],
        contrasts=("fast_goat", *CONTRASTS[:2]),
        sweep=RateSweep((2e-3, 4e-3, 8e-3), TrainingConfig(steps=200, batch_size=16, warmup_steps=20), windows=64),
        training=TrainingConfig(
            steps=750, batch_size=16, warmup_steps=50, log_every=50, evaluate_every=75, checkpoint_every=250
        ),
        seeds=(0, 1, 2),
        curve_windows=64,
        sink_windows=64,
        sink_bins=12,
        probe_windows=4,
    ),
    "h200": _recipe(
        "h200",
        {"num_layers": 10, "embed_dim": 512, "num_heads": 8, "train_length": 1024},
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
        curve_windows=16,
        sink_windows=16,
        sink_bins=16,
        probe_windows=4,
    ),
    "paper": _recipe(
        "paper",
        {"num_layers": 12, "embed_dim": 768, "num_heads": 12, "train_length": 2048},
        corpus="c4",
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
        curve_windows=64,
        sink_windows=16,
        sink_bins=16,
        probe_windows=4,
    ),
}


def recipe(scale: str = "laptop") -> LanguageRecipe:
    """Figure 2 at a scale.

    ``"paper"`` has the paper's decoder, context, tokens, frequencies and precision on C4. It reads bytes where the
    paper reads subwords, so its perplexities are per byte.

    Example:
        >>> recipe("laptop").lengths
        (128, 256, 512, 1024, 2048)
    """
    return RECIPES[check_scale("language", scale)]


# Runs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RateRun(TrainedRun):
    """A short run that judges a learning rate on validation windows."""

    corpus: str
    decoder: DecoderConfig
    training: TrainingConfig
    windows: int


@dataclass(frozen=True)
class DecoderRun(TrainedRun):
    """One decoder, trained on a corpus and measured on its held-out files; fields as in :class:`LanguageRecipe`."""

    corpus: str
    decoder: DecoderConfig
    readings: tuple[str, ...]
    training: TrainingConfig
    lengths: tuple[int, ...]
    curve_windows: int
    sink_windows: int
    sink_bins: int
    probe_windows: int


def runs(recipe: LanguageRecipe, records: Records) -> list[Run]:
    """The sweeps; then, at the best rates, one run a variant and seed, the first seed first, and the contrasts."""
    table = as_table(records)
    found = [run for decoder in recipe.variants for run in _sweep_runs(recipe, decoder)]
    rates = {decoder.attention: best_rate(recipe, table, decoder.attention) for decoder in recipe.variants}
    for seed in recipe.seeds:
        pairs = [(decoder, rates[decoder.attention]) for decoder in recipe.variants]
        if seed == recipe.seeds[0]:
            pairs += [(decoder, rates[recipe.variants[0].attention]) for decoder in recipe.contrasts]
        found += [_decoder_run(recipe, decoder, rate, seed) for decoder, rate in pairs if rate is not None]
    return found


def _sweep_runs(recipe: LanguageRecipe, decoder: DecoderConfig) -> list[Run]:
    sweep, found = recipe.sweep, []
    for rate in sweep.rates:
        training = at_rate(sweep.training, decoder, rate, recipe.seeds[0])
        configuration = RateRun(recipe.corpus, decoder, training, sweep.windows)
        found.append(Run(f"rate-{decoder.attention}-{rate:g}", configuration, judge_rate, chooses=True))
    return found


def _decoder_run(recipe: LanguageRecipe, decoder: DecoderConfig, rate: float, seed: int) -> Run:
    readings = tuple(kind for kind, trained in recipe.readings if trained == decoder.attention)
    training = at_rate(recipe.training, decoder, rate, seed)
    configuration = taken_from(recipe, DecoderRun, decoder=decoder, readings=readings, training=training)
    return Run(f"{decoder.attention}-seed{seed}", configuration, measure)


def at_rate(training: TrainingConfig, decoder: DecoderConfig, rate: float, seed: int) -> TrainingConfig:
    """A training at a rate of the content; log-priors may have a multiple of it."""
    return training.at(rate, seed=seed, prior_rate_factor=decoder.kind.prior_rate_factor)


def best_rate(recipe: LanguageRecipe, table: pandas.DataFrame, variant: str) -> float | None:
    """The rate with the fewest bits per byte on validation files; None until all candidates are judged."""
    judged = select(table, panel="sweep", quantity="bits_per_byte", variant=variant)
    if set(recipe.sweep.rates) - set(judged.get("learning_rate", ())):
        return None
    return float(judged.learning_rate[judged.value.idxmin()])


FIGURE = Figure("fig2_language", recipe, runs)


def judge_rate(run: RateRun, checkpoint: Path) -> Measurement:
    """Train a decoder for a short while and judge it on validation files at the training length."""
    length = run.decoder.train_length
    task = LanguageTask.from_corpus(run.corpus, length=length)
    windows = task.validation_windows(length, run.windows)
    network = Decoder(run.decoder)
    training = train(network, task, run.training, label=_label(run), checkpoint=checkpoint)
    with autocast(run.training, network.embedding.weight.device):
        bits = float(target_bits(network, windows, length=length, num_targets=length).mean())
    place = {"panel": "sweep", "variant": run.decoder.attention, "learning_rate": run.training.learning_rate}
    rows = [place | {"quantity": "bits_per_byte", "unit": "bits", "length": length, "value": bits}]
    rows += [place | row for row in training_rows(training)]
    return Measurement(rows, summary=f"{bits:.3f} bits per byte on validation files", data=task.fingerprint)


def measure(run: DecoderRun, checkpoint: Path) -> Measurement:
    """Train a decoder and measure it."""
    near = run.decoder.train_length
    task = LanguageTask.from_corpus(run.corpus, length=near)
    windows = task.held_out_windows(run.lengths[-1], run.curve_windows)  # fails before any training
    network = Decoder(run.decoder)
    watch = watch_sinks(network, task.validation_windows(near, run.probe_windows)[:, :-1])
    training = train(network, task, run.training, label=_label(run), evaluate=watch, checkpoint=checkpoint)
    rows = training_rows(training)
    for kind in (run.decoder.attention, *run.readings):
        with autocast(run.training, network.embedding.weight.device):
            rows += [{"variant": kind} | row for row in _curve_rows(network.read_as(kind), windows, run.lengths)]
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    seconds = training.wall_seconds
    rows.append({"panel": "training", "quantity": "parameters", "unit": "count", "value": parameters})
    rows.append({"panel": "training", "quantity": "training_seconds", "unit": "seconds", "value": seconds})
    what: Row = {"panel": "e", "quantity": "sink_mass", "unit": "probability"}
    rows += [
        what | {"step": row["step"], "block": block, "value": float(np.mean(heads))}
        for row in training.evaluations
        for block, heads in enumerate(row["sink_mass"])
    ]
    rows += _key_only_rows(network, run.lengths)
    rows += _sink_rows(network, windows[: run.sink_windows, -near:], run.sink_bins)
    rows = [{"variant": run.decoder.attention} | row for row in rows]
    own = [
        row["value"] for row in rows if (row["variant"], row["quantity"]) == (run.decoder.attention, "bits_per_byte")
    ]
    summary = "bits per byte " + ", ".join(f"{bits:.3f}" for bits in own)
    return Measurement(rows, summary, data=task.fingerprint)


def _label(run: RateRun | DecoderRun) -> str:
    return f"{run.decoder.attention}, rate {run.training.learning_rate:g}, seed {run.seed}"


def _curve_rows(network: Decoder, windows: Tensor, lengths: tuple[int, ...]) -> list[Row]:
    """Bits per byte of the same last bytes at every context: the mean, its error over windows, and every window."""
    rows: list[Row] = []
    for length in lengths:
        bits = target_bits(network, windows, length=length, num_targets=lengths[0])
        mean, error = float(bits.mean()), float(bits.std() / math.sqrt(len(bits)))
        place = {"panel": "a", "length": length, "count": len(bits)}
        what = {"quantity": "bits_per_byte", "unit": "bits", "value": mean, "standard_error": error}
        rows += [place | what, place | {"quantity": "perplexity", "unit": "per byte", "value": 2.0**mean}]
        what = {"panel": "a", "length": length, "quantity": "window_bits", "unit": "bits"}
        rows += [what | {"window": n, "value": float(value)} for n, value in enumerate(bits)]
    return rows


def _key_only_rows(network: Decoder, lengths: tuple[int, ...]) -> list[Row]:
    """u(j) of every block, mean over heads; all short positions, then some, and the end of the training window."""
    parts = [key_only_part(block.attention.prior, lengths[-1]) for block in network.blocks]
    shown = {*range(min(lengths[-1], 128)), *range(0, lengths[-1], max(1, lengths[-1] // 256)), lengths[0] - 1}
    what: Row = {"panel": "c", "quantity": "key_only_log_prior", "unit": "nats"}
    return [
        what | {"block": block, "position": j, "value": float(part.float().mean(0)[j])}
        for block, part in enumerate(parts)
        if part is not None
        for j in sorted(shown)
    ]


def _sink_rows(network: Decoder, tokens: Tensor, num_bins: int) -> list[Row]:
    """Mass on the first token by signal strength, averaged over the heads of a block, as in the paper.

    Queries of the second half of the window: early ones have few keys, so that the first would get mass for free.
    """
    blocks = list(sink_observations(network, tokens, first_query=tokens.shape[1] // 2))
    omega = torch.stack([block.score_range.mean(1) for block in blocks])
    mass = torch.stack([block.sink_mass.mean(1) for block in blocks])
    found = sink_mass_by_score_range(omega, mass, num_bins=num_bins)
    return [
        {"panel": "d", "quantity": "sink_mass", "unit": "probability", "count": int(found.counts[m])}
        | {"score_range": float(found.mean_score_range[m]), "standard_error": float(found.standard_error[m])}
        | {"value": float(found.mean_sink_mass[m])}
        for m in np.flatnonzero(found.counts)
    ]
