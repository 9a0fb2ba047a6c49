"""Figure 2: how far does a decoder reach beyond its training length, and what does its sink do?

Legend: B batch, H heads, Q queries, L tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from eotattn.diagnostics import SinkMassReport, sink_mass_by_score_range
from eotattn.experiments.evaluation import length_curve, sink_observations, target_bits
from eotattn.experiments.networks import Decoder, DecoderConfig
from eotattn.experiments.prior_parts import key_only_part
from eotattn.experiments.recipes import LanguageRecipe
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.tasks import LanguageTask
from eotattn.experiments.training import Row, TrainingResult, train
from eotattn.priors import SumPrior
from eotattn.records import provenance

__all__ = ["LanguageStudy", "VariantResult", "run"]

FIGURE = "fig2_language"


@dataclass(frozen=True, eq=False)
class VariantResult:
    """One trained decoder and what was measured on it.

    Attributes:
        variant: Name of its attention.
        seed: Seed of weights and batches.
        parameters: Trainable numbers.
        curve: Rows of :func:`length_curve`.
        near_bits: (N,) bits per byte of every held-out window at the training length, for paired comparisons.
        sinks: Sink mass against signal strength, all blocks together, averaged over the heads of a block.
        key_only: (blocks, H, longest context) learned u(j) in nats, of a GOAT decoder only.
        training: The loss curve, the time and the device.
    """

    variant: str
    seed: int
    parameters: int
    curve: list[Row]
    near_bits: Tensor
    sinks: SinkMassReport
    key_only: Tensor | None
    training: TrainingResult


@dataclass(frozen=True, eq=False)
class LanguageStudy:
    """All decoders of figure 2.

    Attributes:
        recipe: What was run.
        results: One a variant and seed.
        wall_seconds: Training and evaluation together.
    """

    recipe: LanguageRecipe
    results: tuple[VariantResult, ...]
    wall_seconds: float

    def of(self, variant: str) -> tuple[VariantResult, ...]:
        """The results of one variant, by seed."""
        return tuple(result for result in self.results if result.variant == variant)

    def bits_per_byte(self, variant: str) -> dict[int, float]:
        """Context length -> bits per byte, averaged over the seeds."""
        found = self.of(variant)
        return {
            length: sum(result.curve[k]["bits_per_byte"] for result in found) / len(found)
            for k, length in enumerate(self.recipe.lengths)
        }

    @property
    def uniform_mass(self) -> float:
        """Mass on the first token if attention were uniform over the keys, for the queries of panel (c)."""
        queries = range(self.recipe.train_length // 2, self.recipe.train_length)
        return sum(1 / (query + 1) for query in queries) / len(queries)

    def rows(self) -> list[Row]:
        """The tidy table: every plotted value, one a row."""
        return [row for result in self.results for row in _rows(result)]

    def save(self, folder: ResultFolder) -> None:
        """Write the table and its provenance."""
        folder.write_table(self.rows())
        folder.write_provenance(
            provenance(
                command=f"eotattn reproduce --figure 2 --scale {self.recipe.scale}",
                configuration=self.recipe,
                seeds=self.recipe.seeds,
                device=self.results[0].training.device,
                wall_seconds=self.wall_seconds,
            )
        )

    def curve_table(self) -> list[Row]:
        """Bits per byte and perplexity of every variant, seed and length, for display."""
        return [
            {"variant": result.variant, "seed": result.seed} | row for result in self.results for row in result.curve
        ]

    def verdict(self) -> str:
        """The claims, the numbers and whether they held, in Markdown."""
        curves = {decoder.attention: self.bits_per_byte(decoder.attention) for decoder in self.recipe.variants}
        near, far = self.recipe.lengths[0], self.recipe.lengths[-1]
        factor = self.recipe.length_factors[-1]
        gain, gain_error = self.paired_gain("goat", over="alibi")
        drift = {name: curve[far] - curve[near] for name, curve in curves.items()}
        worst = _largest_rise([curves["goat"][length] for length in self.recipe.lengths])
        sinks = {name: self.of(name)[0].sinks for name in ("goat", "rope")}
        (first, last), (rope_first, rope_last) = _ends(sinks["goat"]), _ends(sinks["rope"])
        seeds = f"{len(self.recipe.seeds)} seed" + ("s" if len(self.recipe.seeds) > 1 else "")
        lines = (
            f"- **In distribution ({near} tokens), GOAT better than ALiBi: {_held(gain > 2 * gain_error)}.** "
            f"{curves['goat'][near]:.3f} against {curves['alibi'][near]:.3f} bits per byte, a gain of {gain:+.3f} "
            f"with a paired standard error of {gain_error:.3f} over windows (held means more than two of them; "
            f"perplexity {2 ** curves['goat'][near]:.2f} against {2 ** curves['alibi'][near]:.2f}); "
            f"RoPE has {curves['rope'][near]:.3f}.",
            f"- **RoPE diverges: {_held(drift['rope'] > 0.5)}.** From {near} to {far} tokens ({factor}x) it moves by "
            f"{drift['rope']:+.3f} bits per byte (divergence means more than +0.5).",
            f"- **GOAT stable to {factor}x: {_held(worst < 0.1)}.** It moves by {drift['goat']:+.3f}; its largest rise "
            f"above a shorter context is {worst:+.3f} (stable means less than +0.1); ALiBi moves by "
            f"{drift['alibi']:+.3f}.",
            *self._key_only_verdict(),
            f"- **GOAT's sink mass falls as the signal grows: {_held(_mass_falls(sinks['goat']))}.** "
            f"{first:.4f} in the weakest bin of omega, {last:.4f} in the strongest (RoPE: {rope_first:.4f} and "
            f"{rope_last:.4f}); uniform attention would give {self.uniform_mass:.4f}.",
            f"- {seeds} at scale `{self.recipe.scale}`; {self.wall_seconds:.0f} s on "
            f"{self.results[0].training.device}. The prior's learning rate was chosen on these same held-out files, so "
            f"GOAT's numbers are a little optimistic; intervals over seeds are missing.",
        )
        return "\n".join(lines)

    def paired_gain(self, variant: str, *, over: str) -> tuple[float, float]:
        """Bits per byte that ``variant`` saves at the training length, and its standard error over the same windows."""
        pairs = zip(self.of(variant), self.of(over), strict=True)
        saved = torch.stack([theirs.near_bits - ours.near_bits for ours, theirs in pairs]).mean(0)
        return float(saved.mean()), float(saved.std() / math.sqrt(saved.numel()))

    def _key_only_verdict(self) -> tuple[str, str]:
        """Spike and rise of u(j), counted over the heads of all blocks of the first seed's GOAT decoder."""
        key_only = self.of("goat")[0].key_only
        assert key_only is not None
        end = self.recipe.train_length - 1
        spike = (key_only[..., 0] - key_only[..., 1]).flatten()
        rise = (key_only[..., end] - key_only[..., 1]).flatten()
        return (
            f"- **u(j) has a spike at the first token: {_held(_most(spike))}.** u(0) - u(1) is positive in "
            f"{int((spike > 0).sum())} of {spike.numel()} heads; mean {float(spike.mean()):+.2f} nats, largest "
            f"{float(spike.max()):+.2f} (held means most heads and more than +0.5 on average).",
            f"- **u(j) rises towards the training length: {_held(_most(rise))}.** u({end}) - u(1) is positive in "
            f"{int((rise > 0).sum())} of {rise.numel()} heads; mean {float(rise.mean()):+.2f} nats.",
        )


def run(
    recipe: LanguageRecipe, *, report: Callable[[str], None] = print, checkpoints: Path | None = None
) -> LanguageStudy:
    """Train every variant with every seed on the same batches, and measure them on the same held-out bytes.

    Args:
        recipe: From :func:`eotattn.experiments.recipes.language`.
        report: Receives one line a finished decoder.
        checkpoints: Folder for one checkpoint a decoder, from which an interrupted call continues; it must exist. A
            call that finishes removes them, so that the next one trains anew.
    """
    started = time.perf_counter()
    task = LanguageTask.from_corpus(recipe.corpus, length=recipe.train_length)
    windows = task.held_out_windows(recipe.lengths[-1], recipe.curve_windows)  # fails before any training
    results = []
    for seed in recipe.seeds:
        for decoder in recipe.variants:
            result = _run_variant(recipe, decoder, seed, task, windows, checkpoints)
            results.append(result)
            curve = ", ".join(f"{row['bits_per_byte']:.3f}" for row in result.curve)
            seconds = result.training.wall_seconds
            report(f"{result.variant}, seed {seed}: trained in {seconds:.0f} s; bits per byte {curve}")
    for finished in () if checkpoints is None else tuple(checkpoints.glob("*.pt")):
        finished.unlink()
    return LanguageStudy(recipe, tuple(results), time.perf_counter() - started)


def _run_variant(
    recipe: LanguageRecipe,
    config: DecoderConfig,
    seed: int,
    task: LanguageTask,
    windows: Tensor,
    checkpoints: Path | None,
) -> VariantResult:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Decoder(config)
    label = f"{config.attention}, seed {seed}"
    checkpoint = None if checkpoints is None else checkpoints / f"{config.attention}_seed{seed}.pt"
    training = train(network, task, replace(recipe.training, seed=seed), label=label, checkpoint=checkpoint)
    network.eval()
    curve = length_curve(network, windows, lengths=recipe.lengths, num_targets=recipe.train_length)
    return VariantResult(
        variant=config.attention,
        seed=seed,
        parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        curve=curve,
        near_bits=target_bits(network, windows, length=recipe.train_length, num_targets=recipe.train_length),
        sinks=_sinks(network, windows[: recipe.sink_windows, -recipe.train_length :], recipe.sink_bins),
        key_only=_key_only(network, recipe.lengths[-1]),
        training=training,
    )


def _largest_rise(curve: Sequence[float]) -> float:
    """Largest climb above the best value so far."""
    return max(value - min(curve[: index + 1]) for index, value in enumerate(curve))


def _sinks(network: Decoder, tokens: Tensor, num_bins: int) -> SinkMassReport:
    """Averaged over the heads of a block, as in the paper; queries of the second half of the window.

    Early queries have few keys, so that the first one would get mass for free.
    """
    blocks = list(sink_observations(network, tokens, first_query=tokens.shape[1] // 2))
    omega = torch.stack([block.score_range.mean(1) for block in blocks])
    mass = torch.stack([block.sink_mass.mean(1) for block in blocks])
    return sink_mass_by_score_range(omega, mass, num_bins=num_bins)


def _key_only(network: Decoder, length: int) -> Tensor | None:
    if network.config.attention != "goat":
        return None
    priors = (block.attention.prior for block in network.blocks)
    return torch.stack([key_only_part(cast("SumPrior", prior), length) for prior in priors])


def _rows(result: VariantResult) -> list[Row]:
    rows: list[Row] = []

    def add(panel: str, quantity: str, unit: str, value: float, **where: float) -> None:
        columns = ("length", "block", "head", "position", "score_range", "step", "standard_error", "count")
        place = {name: where.get(name, "") for name in columns}
        rows.append({"figure": FIGURE, "panel": panel, "variant": result.variant, "seed": result.seed} | place)
        rows[-1] |= {"quantity": quantity, "unit": unit, "value": value}

    for row in result.curve:
        place = {"length": row["length"], "count": row["windows"]}
        add("a", "bits_per_byte", "bits", row["bits_per_byte"], standard_error=row["standard_error"], **place)
        add("a", "perplexity", "per byte", row["perplexity"], **place)
    if result.key_only is not None:
        blocks, heads, length = result.key_only.shape
        positions = sorted({*range(min(length, 128)), *range(0, length, max(1, length // 256))})
        for b in range(blocks):
            for h in range(heads):
                for j in positions:
                    value = float(result.key_only[b, h, j])
                    add("b", "key_only_log_prior", "nats", value, block=b, head=h, position=j)
    for m, count in enumerate(result.sinks.counts.tolist()):
        if count > 0:
            place = {"score_range": float(result.sinks.mean_score_range[m]), "count": count}
            error = float(result.sinks.standard_error[m])
            add("c", "sink_mass", "probability", float(result.sinks.mean_sink_mass[m]), standard_error=error, **place)
    for entry in result.training.rows:
        add("training", "training_loss", "nats per token", entry["loss"], step=entry["step"])
    add("training", "parameters", "count", float(result.parameters))
    add("training", "wall_seconds", "seconds", result.training.wall_seconds)
    return rows


def _ends(sinks: SinkMassReport) -> tuple[float, float]:
    mass = sinks.mean_sink_mass[sinks.counts > 0]
    return float(mass[0]), float(mass[-1])


def _mass_falls(sinks: SinkMassReport) -> bool:
    """Whether mass and signal strength are anticorrelated over the bins and the strongest bin is below the weakest."""
    mass = torch.as_tensor(sinks.mean_sink_mass[sinks.counts > 0])
    order = torch.arange(len(mass), dtype=torch.float64)
    first, last = _ends(sinks)
    falls_in_rank = float(torch.corrcoef(torch.stack([order, mass.argsort().argsort().double()]))[0, 1]) < -0.5
    return last < first and falls_in_rank


def _most(values: Tensor) -> bool:
    """Whether more than half of the values are positive, and their mean is above half a nat."""
    return float((values > 0).double().mean()) > 0.5 and float(values.mean()) > 0.5


def _held(condition: bool) -> str:
    return "held" if condition else "did NOT hold"
