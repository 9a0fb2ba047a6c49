"""Where sinks live: what attention's first token is made of, by kind of attention; from recipe to picture.

One decoder is trained with every kind of attention on the same batches. While it trains and afterwards it is asked how
much of its heads' mass lies on the first token, how much of that margin is prior, what the token's activations and
values do, and what is lost when u(j), bits or the first key are taken away.

Legend: A blocks, H heads, N windows, L tokens.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from eotattn.diagnostics import SinkMassReport
from eotattn.experiments.device import training_device
from eotattn.experiments.interventions import in_eight_bits, keys_beyond, target_losses, without_key_only
from eotattn.experiments.networks import ATTENTION_KINDS, Decoder, DecoderConfig
from eotattn.experiments.records import Measurement, Records, Row, Run, TrainedRun, taken_from
from eotattn.experiments.scales import check_scale
from eotattn.experiments.sink_measures import activation_outliers, mass_by_signal, measure_sinks
from eotattn.experiments.study import Figure
from eotattn.experiments.tasks.language import PYTHON_STDLIB
from eotattn.experiments.tasks.token_text import BOOKS, TokenText, Windows, begin
from eotattn.experiments.training import TrainingConfig, autocast, train, training_rows
from eotattn.processes import is_first_process

__all__ = ["ARMS", "FIGURE", "RECIPES", "Arm", "SinkRecipe", "SinkRun", "measure", "recipe", "runs"]

# Recipe -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One decoder of the study.

    Args:
        name: In tables and file names.
        attention: A name in :data:`ATTENTION_KINDS`.
        begins: Whether every window begins with the first token.
    """

    name: str
    attention: str
    begins: bool = True


#: By priority: all arms run with the first seed before any runs with the second.
ARMS = tuple(
    arm
    for arm in (
        Arm("rope", "rope"),
        Arm("paper_goat", "fast_paper_goat"),
        Arm("goat", "fast_goat"),
        Arm("rope_without_token", "rope", begins=False),
        Arm("alibi_goat", "alibi_goat"),
        Arm("alibi_goat_forgetting", "alibi_goat_forgetting"),
        Arm("forgetting", "forgetting"),
        Arm("rope_sink_logit", "rope_sink_logit"),
        Arm("rope_key_only", "rope_key_only"),
        Arm("rope_output_gate", "rope_output_gate"),
        Arm("rope_zero_key", "rope_zero_key"),
    )
    if arm.attention in ATTENTION_KINDS
)


@dataclass(frozen=True)
class SinkRecipe:
    """The study at a scale.

    Args:
        scale: Name of the scale.
        corpus: As in :meth:`TokenText.open`.
        arms: Decoders; equal but for the attention and the first token.
        decoder: Their sizes; the attention is replaced.
        training: The run; the seed is replaced.
        seeds: Of weights and batches.
        lengths: Contexts on test documents, tokens; the first is the training length.
        test_windows: Windows on test documents, and how many of them one document gives at most.
        probe_windows: Validation windows of the whole training length for activations and figure 2c; sinks are measured
            on eight times as many, cut to 64 tokens.
        bins: Of signal strength.
    """

    scale: str
    corpus: str
    arms: tuple[Arm, ...]
    decoder: DecoderConfig
    training: TrainingConfig
    seeds: tuple[int, ...]
    lengths: tuple[int, ...]
    test_windows: tuple[int, int]
    probe_windows: int
    bins: int


_LAPTOP_ARMS = tuple(arm for arm in ARMS if arm.name in ("rope", "paper_goat", "rope_without_token"))
_TINY = DecoderConfig("rope", 257, num_layers=1, embed_dim=32, num_heads=2, train_length=32, block="llama")

RECIPES = {
    "smoke": SinkRecipe(
        scale="smoke",
        corpus=PYTHON_STDLIB,
        arms=_LAPTOP_ARMS,
        decoder=_TINY,
        training=TrainingConfig(
            steps=10, batch_size=4, warmup_steps=2, clip_priors=False, log_every=5, evaluate_every=5
        ),
        seeds=(0, 1),
        lengths=(32, 64),
        test_windows=(8, 2),
        probe_windows=2,
        bins=4,
    ),
    "laptop": SinkRecipe(
        scale="laptop",
        corpus=PYTHON_STDLIB,
        arms=_LAPTOP_ARMS,
        decoder=replace(_TINY, num_layers=2, embed_dim=64, num_heads=4, train_length=128),
        training=TrainingConfig(
            steps=700,
            batch_size=16,
            learning_rate=4e-3,
            prior_learning_rate=4e-2,
            warmup_steps=40,
            clip_priors=False,
            log_every=50,
            evaluate_every=350,
            checkpoint_every=350,
        ),
        seeds=(0, 1, 2),
        lengths=(128, 256, 2048),
        test_windows=(64, 2),
        probe_windows=4,
        bins=8,
    ),
    "gpu": SinkRecipe(
        scale="gpu",
        corpus=BOOKS,
        arms=ARMS,
        decoder=DecoderConfig(
            "rope", 16_384, num_layers=12, embed_dim=512, num_heads=8, train_length=1024, block="llama"
        ),
        training=TrainingConfig(
            steps=1100,  # 144e6 tokens in batches of 128 windows of 1024
            batch_size=128,
            learning_rate=1e-3,
            prior_learning_rate=1e-2,
            warmup_steps=100,
            clip_priors=False,
            accumulation=2,
            compile=True,
            precision="bf16",
            log_every=50,
            evaluate_every=250,
            checkpoint_every=100,
        ),
        seeds=(0, 1, 2),
        lengths=(1024, 2048, 16_384),
        test_windows=(128, 2),
        probe_windows=8,
        bins=16,
    ),
}
# 110 M parameters: 85.0 M in the blocks and 12.6 M in each of the tables at both ends; several GPUs share a run.
RECIPES["paper"] = replace(
    RECIPES["gpu"],
    scale="paper",
    arms=tuple(arm for arm in ARMS if arm.name in ("rope", "goat", "alibi_goat")),
    decoder=replace(RECIPES["gpu"].decoder, embed_dim=768, num_heads=12, train_length=2048),
    training=replace(
        RECIPES["gpu"].training,
        steps=2000,  # 524e6 tokens in batches of 128 windows of 2048: five times those of 400e6 characters
        learning_rate=6e-4,
        prior_learning_rate=6e-3,
        warmup_steps=200,
        accumulation=8,
        evaluate_every=500,
    ),
    lengths=(2048, 4096, 32_768),
)


def recipe(scale: str = "laptop") -> SinkRecipe:
    """The study at a scale.

    Example:
        >>> recipe("gpu").training.steps
        1100
    """
    return RECIPES[check_scale("sink_study", scale, RECIPES)]


# Runs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SinkRun(TrainedRun):
    """One arm with one seed; fields as in :class:`SinkRecipe`."""

    corpus: str
    arm: Arm
    decoder: DecoderConfig
    training: TrainingConfig
    lengths: tuple[int, ...]
    test_windows: tuple[int, int]
    probe_windows: int
    bins: int


def runs(recipe: SinkRecipe, records: Records) -> list[Run]:
    """One run an arm and seed, the first seed of all arms first."""
    return [
        Run(
            f"{arm.name}-seed{seed}",
            taken_from(
                recipe,
                SinkRun,
                arm=arm,
                decoder=replace(recipe.decoder, attention=arm.attention),
                training=replace(recipe.training, seed=seed),
            ),
            measure,
        )
        for seed in recipe.seeds
        for arm in recipe.arms
    ]


FIGURE = Figure("fig_sinks", recipe, runs, tuple(RECIPES))


def measure(run: SinkRun, checkpoint: Path) -> Measurement:
    """Train a decoder and measure it; nothing is chosen, so test documents are read at the end alone."""
    text = TokenText.open(run.corpus)
    near = run.decoder.train_length
    test = text.windows("test", run.lengths[-1], per_document=run.test_windows[1], limit=run.test_windows[0])
    validation = text.windows("validation", near, per_document=8, limit=8 * run.probe_windows).tokens
    beginning = text.beginning if run.arm.begins else None
    network = Decoder(run.decoder).to(training_device()).eval()
    probe = _Probe(run, validation, beginning)
    untrained = mass_by_signal(network, probe.inputs[: run.probe_windows], num_bins=run.bins)
    training = train(
        network,
        text.training(near, begins=run.arm.begins),
        run.training,
        label=f"{run.arm.name}, seed {run.seed}",
        evaluate=probe.watch,
        checkpoint=checkpoint,
    )
    rows = training_rows(training)
    rows += [
        {"quantity": name, "step": each["step"], "value": each[name]}
        for each in training.evaluations
        for name in each
        if name != "step"
    ]
    with autocast(run.training, training_device()):
        rows += _test_rows(network, run, test, beginning)
        rows += _intervention_rows(network, run, test, beginning, probe)
    heads = measure_sinks(network, probe.inputs)
    rows += [
        {"quantity": f"head_{name}", "block": block, "head": head, "value": value}
        for name, array in heads.arrays().items()
        for (block, head), value in np.ndenumerate(array)
        if not np.isnan(value)
    ]
    trained = mass_by_signal(network, probe.inputs[: run.probe_windows], num_bins=run.bins)
    for state, reports in (("untrained", untrained), ("trained", trained)):
        rows += [row for protocol, report in reports.items() for row in _signal_rows(report, protocol, state)]
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    rows.append({"quantity": "parameters", "value": parameters})
    rows.append({"quantity": "training_seconds", "unit": "seconds", "value": training.wall_seconds})
    last = training.evaluations[-1]
    summary = f"validation {last['validation_loss']:.3f} nats a token, sink rate {last['sink_rate']:.2f}"
    place = {"arm": run.arm.name, "seed": run.seed}
    return Measurement([place | _plain(row) for row in rows], summary=summary, data=text.fingerprint)


class _Probe:
    """What is asked of a network while it trains, on validation windows."""

    def __init__(self, run: SinkRun, windows: Tensor, beginning: int | None) -> None:
        self.run, self.windows, self.beginning = run, windows, beginning
        self.inputs = begin(windows, beginning).inputs

    def watch(self, network: nn.Module, step: int) -> list[Row]:
        """Loss, sinks and outliers of one step, also as a line on the error stream."""
        assert isinstance(network, Decoder)
        near = self.run.decoder.train_length
        losses = target_losses(network, self.windows, length=near, num_targets=near, beginning=self.beginning)
        row = {"validation_loss": float(losses.mean())} | measure_sinks(network, self.inputs).summary()
        row |= activation_outliers(network, self.inputs[: self.run.probe_windows])
        line = f"loss {row['validation_loss']:.3f}, sink rate {row['sink_rate']:.2f}, massive {row['massive']:.0f}"
        if is_first_process():
            print(f"{self.run.arm.name}, seed {self.run.seed}, step {step}: {line}", file=sys.stderr, flush=True)
        return [row]


def _test_rows(network: Decoder, run: SinkRun, test: Windows, beginning: int | None) -> list[Row]:
    """Loss on the last tokens of every test document at every context; one row a document, its windows' mean."""
    rows: list[Row] = []
    for length in run.lengths:
        losses = target_losses(network, test.tokens, length=length, num_targets=run.lengths[0], beginning=beginning)
        for document in test.documents.unique().tolist():
            value = float(losses[test.documents == document].mean())
            rows.append({"quantity": "test_loss", "length": length, "document": document, "value": value})
    return rows


def _intervention_rows(
    network: Decoder, run: SinkRun, test: Windows, beginning: int | None, probe: _Probe
) -> list[Row]:
    """Loss at the training length with something taken away; the second half of the window's tokens."""
    near = run.decoder.train_length
    device = training_device()
    far, kept = (keys_beyond(near, near // 2, keeps_first=first, device=device) for first in (False, True))
    changed = without_key_only(network)
    cases: dict[str, tuple[Decoder | None, Tensor | None]] = {
        "nothing": (network, None),
        "eight_bits": (in_eight_bits(network), None),
        "far_keys": (network, far),
        "far_keys_but_the_first": (network, kept),
        "key_only": (changed, None),
    }
    rows: list[Row] = []
    for name, (reader, hidden_keys) in cases.items():
        if reader is None:
            continue
        losses = target_losses(
            reader, test.tokens, length=near, num_targets=near // 2, beginning=beginning, hidden_keys=hidden_keys
        )
        rows.append({"quantity": "loss_without", "removed": name, "value": float(losses.mean())})
    if changed is not None:
        rate = measure_sinks(changed, probe.inputs).summary()["sink_rate"]
        rows.append({"quantity": "sink_rate_without", "removed": "key_only", "value": rate})
    return rows


def _signal_rows(report: SinkMassReport, protocol: str, state: str) -> list[Row]:
    """Figure 2c's bins."""
    return [
        {"quantity": "mass_by_signal", "protocol": protocol, "state": state, "signal": float(signal)}
        | {"count": int(count), "value": float(mass)}
        for signal, mass, count in zip(report.mean_score_range, report.mean_sink_mass, report.counts, strict=True)
        if count
    ]


def _plain(row: Row) -> Row:
    """Six digits of every number; NaN, which JSON lacks, becomes None."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, float):
            found[name] = None if np.isnan(value) else float(f"{value:.6g}")
        else:
            found[name] = value
    return found
