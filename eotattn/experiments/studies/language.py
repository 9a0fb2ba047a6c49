"""Figure 2's runs: how far does a decoder reach beyond its training length, and what does its sink do?

Legend: A blocks, H heads, L tokens, S recorded steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from eotattn.diagnostics import SinkMassReport, sink_mass_by_score_range
from eotattn.experiments.evaluation import length_curve, sink_observations, target_bits, watch_sinks
from eotattn.experiments.networks import Decoder, DecoderConfig
from eotattn.experiments.prior_parts import key_only_part
from eotattn.experiments.recipes.language import LanguageRecipe
from eotattn.experiments.records import Measurement, Records, Row, Run
from eotattn.experiments.tasks import LanguageTask
from eotattn.experiments.training import TrainingConfig, autocast, train, training_rows

__all__ = ["DecoderRun", "RateRun", "best_rate", "measure", "measure_rate", "runs", "sweep_runs"]


@dataclass(frozen=True)
class RateRun:
    """A short run that judges a learning rate.

    Args:
        corpus: As in :meth:`LanguageTask.from_corpus`.
        decoder: Sizes and the name of the attention.
        training: The run.
        windows: Validation windows.
    """

    corpus: str
    decoder: DecoderConfig
    training: TrainingConfig
    windows: int

    @property
    def seed(self) -> int:
        """Seed of weights and batches."""
        return self.training.seed


@dataclass(frozen=True)
class DecoderRun:
    """One decoder, trained on a corpus and measured on its held-out files.

    Args:
        corpus: As in :meth:`LanguageTask.from_corpus`.
        decoder: Sizes and the name of the attention.
        readings: Kinds of attention with the same weights that the trained decoder is also read as.
        training: The run.
        lengths: Evaluation contexts, tokens.
        curve_windows: Held-out windows behind every point of the curve.
        sink_windows: Held-out windows behind the sink panel.
        sink_bins: Bins of signal strength.
        probe_windows: Validation windows on which sinks are watched during training.
    """

    corpus: str
    decoder: DecoderConfig
    readings: tuple[str, ...]
    training: TrainingConfig
    lengths: tuple[int, ...]
    curve_windows: int
    sink_windows: int
    sink_bins: int
    probe_windows: int

    @property
    def seed(self) -> int:
        """Seed of weights and batches."""
        return self.training.seed


def sweep_runs(recipe: LanguageRecipe, variant: str) -> dict[float, Run]:
    """Learning rate -> the run that judges it for a variant."""
    (decoder,) = [decoder for decoder in recipe.variants if decoder.attention == variant]
    found = {}
    for rate in recipe.sweep.rates:
        training = _at(recipe.sweep.training, decoder, rate, recipe.seeds[0])
        run = RateRun(recipe.corpus, decoder, training, recipe.sweep.windows)
        found[rate] = Run(f"rate-{variant}-{rate:g}", run, measure_rate)
    return found


def best_rate(recipe: LanguageRecipe, records: Records, variant: str) -> float | None:
    """The rate with the fewest bits per byte on validation files; None until all candidates are judged."""
    sweep = sweep_runs(recipe, variant)
    if any(run.name not in records for run in sweep.values()):
        return None
    return min(sweep, key=lambda rate: float(records[sweep[rate].name].value("bits_per_byte")))


def runs(recipe: LanguageRecipe, records: Records) -> list[Run]:
    """The sweeps; then, at the best rates, one run a variant and seed, the first seed first, and the contrasts."""
    names = [decoder.attention for decoder in recipe.variants]
    found = [run for name in names for run in sweep_runs(recipe, name).values()]
    rates = {name: best_rate(recipe, records, name) for name in names}
    for seed in recipe.seeds:
        for decoder in recipe.variants:
            rate = rates[decoder.attention]
            if rate is not None:
                found.append(_decoder_run(recipe, decoder, rate, seed))
        first_rate = rates[names[0]]
        if seed == recipe.seeds[0] and first_rate is not None:
            found += [_decoder_run(recipe, decoder, first_rate, seed) for decoder in recipe.contrasts]
    return found


def _decoder_run(recipe: LanguageRecipe, decoder: DecoderConfig, rate: float, seed: int) -> Run:
    configuration = DecoderRun(
        recipe.corpus,
        decoder,
        recipe.readings_of(decoder.attention),
        _at(recipe.training, decoder, rate, seed),
        recipe.lengths,
        recipe.curve_windows,
        recipe.sink_windows,
        recipe.sink_bins,
        recipe.probe_windows,
    )
    return Run(f"{decoder.attention}-seed{seed}", configuration, measure)


def _at(training: TrainingConfig, decoder: DecoderConfig, rate: float, seed: int) -> TrainingConfig:
    return training.at(rate, seed=seed, prior_rate_factor=decoder.kind.prior_rate_factor)


def measure_rate(run: RateRun, checkpoint: Path) -> Measurement:
    """Train a decoder for a short while and judge it on validation files at the training length."""
    length = run.decoder.train_length
    task = LanguageTask.from_corpus(run.corpus, length=length)
    windows = task.validation_windows(length, run.windows)
    network = Decoder(run.decoder)
    training = train(network, task, run.training, label=_label(run), checkpoint=checkpoint)
    with autocast(run.training, _device(network)):
        bits = float(target_bits(network, windows, length=length, num_targets=length).mean())
    place = {"panel": "sweep", "variant": run.decoder.attention, "learning_rate": run.training.learning_rate}
    rows = [place | {"quantity": "bits_per_byte", "unit": "bits", "length": length, "value": bits}]
    rows += [place | row for row in training_rows(training)]
    return Measurement(rows, summary=f"{bits:.3f} bits per byte on validation files", data=task.fingerprint)


def measure(run: DecoderRun, checkpoint: Path) -> Measurement:
    """Train a decoder and measure it.

    Args:
        run: What to do.
        checkpoint: File of the unfinished training.
    """
    near = run.decoder.train_length
    task = LanguageTask.from_corpus(run.corpus, length=near)
    windows = task.held_out_windows(run.lengths[-1], run.curve_windows)  # fails before any training
    network = Decoder(run.decoder)
    watch = watch_sinks(network, task.validation_windows(near, run.probe_windows)[:, :-1])
    training = train(network, task, run.training, label=_label(run), evaluate=watch, checkpoint=checkpoint)
    rows = training_rows(training)
    with autocast(run.training, _device(network)):
        curves = {name: _curve(network.read_as(name), windows, run.lengths) for name in _kinds(run)}
    sinks = _sinks(network, windows[: run.sink_windows, -near:], run.sink_bins)
    for name, curve in curves.items():
        rows += [{"variant": name} | row for row in curve]
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    rows.append({"panel": "training", "quantity": "parameters", "unit": "count", "value": parameters})
    rows.append(
        {"panel": "training", "quantity": "training_seconds", "unit": "seconds", "value": training.wall_seconds}
    )
    arrays = {f"sinks.{field.name}": np.asarray(getattr(sinks, field.name)) for field in fields(sinks)}
    arrays["formation.step"] = np.array([row["step"] for row in training.evaluations])
    arrays["formation.sink_mass"] = np.array([row["sink_mass"] for row in training.evaluations])
    key_only = _key_only(network, run.lengths[-1])
    if key_only is not None:
        arrays["key_only"] = key_only.float().numpy()
    bits = [row["value"] for row in curves[run.decoder.attention] if row["quantity"] == "bits_per_byte"]
    return Measurement(rows, arrays, "bits per byte " + ", ".join(f"{b:.3f}" for b in bits), data=task.fingerprint)


def _label(run: RateRun | DecoderRun) -> str:
    return f"{run.decoder.attention}, rate {run.training.learning_rate:g}, seed {run.seed}"


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _kinds(run: DecoderRun) -> tuple[str, ...]:
    return (run.decoder.attention, *run.readings)


def _curve(network: Decoder, windows: Tensor, lengths: tuple[int, ...]) -> list[Row]:
    """Tidy rows of :func:`length_curve`."""
    rows: list[Row] = []
    for row in length_curve(network, windows, lengths=lengths, num_targets=lengths[0]):
        place = {"panel": "a", "length": row["length"], "count": row["windows"]}
        bits = {"quantity": "bits_per_byte", "unit": "bits", "value": row["bits_per_byte"]}
        rows.append(place | bits | {"standard_error": row["standard_error"]})
        rows.append(place | {"quantity": "perplexity", "unit": "per byte", "value": row["perplexity"]})
    return rows


def _sinks(network: Decoder, tokens: Tensor, num_bins: int) -> SinkMassReport:
    """Averaged over the heads of a block, as in the paper; queries of the second half of the window.

    Early queries have few keys, so that the first one would get mass for free.
    """
    blocks = list(sink_observations(network, tokens, first_query=tokens.shape[1] // 2))
    omega = torch.stack([block.score_range.mean(1) for block in blocks])
    mass = torch.stack([block.sink_mass.mean(1) for block in blocks])
    return sink_mass_by_score_range(omega, mass, num_bins=num_bins)


def _key_only(network: Decoder, length: int) -> Tensor | None:
    """(A, H, L) u(j) of every block, nats; None where a prior has none."""
    parts = [key_only_part(block.attention.prior, length) for block in network.blocks]
    return None if any(part is None for part in parts) else torch.stack([part for part in parts if part is not None])
