"""Figure 2: how far does a decoder reach beyond its training length, and what does its sink do?

Legend: B batch, H heads, Q queries, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from eotattn.diagnostics import SinkMassReport, sink_mass_by_score_range
from eotattn.experiments.evaluation import length_curve, sink_observations, target_bits
from eotattn.experiments.networks import Decoder, DecoderConfig
from eotattn.experiments.prior_parts import key_only_part
from eotattn.experiments.recipes import LanguageRecipe
from eotattn.experiments.records import Measurement, Record, Records, Row, Run, merged_provenance
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.tasks import LanguageTask
from eotattn.experiments.training import TrainingConfig, train, training_rows
from eotattn.priors import SumPrior

__all__ = ["DecoderRun", "LanguageStudy", "VariantResult", "measure", "runs"]

FIGURE = "fig2_language"


@dataclass(frozen=True)
class DecoderRun:
    """One decoder, trained on a corpus and measured on its held-out files.

    Args:
        corpus: As in :func:`eotattn.experiments.tasks.find_texts`.
        decoder: Sizes and the name of the attention.
        training: The run.
        lengths: Evaluation contexts, tokens.
        curve_windows: Held-out windows behind every point of the curve.
        sink_windows: Held-out windows behind the sink panel.
        sink_bins: Bins of signal strength.
    """

    corpus: str
    decoder: DecoderConfig
    training: TrainingConfig
    lengths: tuple[int, ...]
    curve_windows: int
    sink_windows: int
    sink_bins: int

    @property
    def seed(self) -> int:
        """Seed of weights and batches."""
        return self.training.seed


def runs(recipe: LanguageRecipe, records: Records) -> list[Run]:
    """One run a variant and seed: the same batches for all variants, measured on the same held-out bytes."""
    measured = (recipe.lengths, recipe.curve_windows, recipe.sink_windows, recipe.sink_bins)
    return [
        Run(
            f"{decoder.attention}-seed{seed}",
            DecoderRun(recipe.corpus, decoder, replace(recipe.training, seed=seed), *measured),
            measure,
        )
        for seed in recipe.seeds
        for decoder in recipe.variants
    ]


def measure(run: DecoderRun, checkpoint: Path) -> Measurement:
    """Train a decoder and measure it.

    Args:
        run: What to do.
        checkpoint: File of the unfinished training.
    """
    task = LanguageTask.from_corpus(run.corpus, length=run.decoder.train_length)
    windows = task.held_out_windows(run.lengths[-1], run.curve_windows)  # fails before any training
    network = Decoder(run.decoder)
    near = run.decoder.train_length
    label = f"{run.decoder.attention}, seed {run.seed}"
    training = train(network, task, run.training, label=label, checkpoint=checkpoint)
    network.eval()
    curve = length_curve(network, windows, lengths=run.lengths, num_targets=near)
    sinks = _sinks(network, windows[: run.sink_windows, -near:], run.sink_bins)
    arrays = {"near_bits": target_bits(network, windows, length=near, num_targets=near).numpy()}
    arrays |= {f"sinks.{field.name}": np.asarray(getattr(sinks, field.name)) for field in fields(sinks)}
    if run.decoder.attention == "goat":
        arrays["key_only"] = _key_only(network, run.lengths[-1]).numpy()
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    rows = _curve_rows(curve) + training_rows(training)
    rows.append({"panel": "training", "quantity": "parameters", "unit": "count", "value": parameters})
    summary = "bits per byte " + ", ".join(f"{row['bits_per_byte']:.3f}" for row in curve)
    return Measurement(rows, arrays, summary)


@dataclass(frozen=True, eq=False)
class VariantResult:
    """What was measured on one trained decoder, read from its record.

    Attributes:
        variant: Name of its attention.
        record: Of the run.
    """

    variant: str
    record: Record

    @property
    def seed(self) -> int:
        """Seed of weights and batches."""
        return self.record.seed

    @property
    def curve(self) -> dict[int, float]:
        """Context length -> bits per byte."""
        return {row["length"]: row["value"] for row in self.record.rows_of("bits_per_byte")}

    @property
    def near_bits(self) -> Tensor:
        """(N,) bits per byte of every held-out window at the training length, for paired comparisons."""
        return torch.as_tensor(self.record.arrays["near_bits"])

    @property
    def sinks(self) -> SinkMassReport:
        """Sink mass against signal strength, all blocks together, averaged over the heads of a block."""
        return SinkMassReport(**{f.name: self.record.arrays[f"sinks.{f.name}"] for f in fields(SinkMassReport)})

    @property
    def key_only(self) -> Tensor | None:
        """(blocks, H, longest context) learned u(j) in nats, of a GOAT decoder only."""
        found = self.record.arrays.get("key_only")
        return None if found is None else torch.as_tensor(found)


@dataclass(frozen=True, eq=False)
class LanguageStudy:
    """All decoders of figure 2.

    Attributes:
        recipe: What was run.
        records: Of all its runs.
    """

    recipe: LanguageRecipe
    records: Records

    @cached_property
    def results(self) -> tuple[VariantResult, ...]:
        """One a variant and seed."""
        recipe = self.recipe
        pairs = ((decoder.attention, seed) for seed in recipe.seeds for decoder in recipe.variants)
        return tuple(VariantResult(variant, self.records[f"{variant}-seed{seed}"]) for variant, seed in pairs)

    def of(self, variant: str) -> tuple[VariantResult, ...]:
        """The results of one variant, by seed."""
        return tuple(result for result in self.results if result.variant == variant)

    def bits_per_byte(self, variant: str) -> dict[int, float]:
        """Context length -> bits per byte, averaged over the seeds."""
        found = self.of(variant)
        return {length: sum(result.curve[length] for result in found) / len(found) for length in self.recipe.lengths}

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
        command = f"eotattn reproduce --figure 2 --scale {self.recipe.scale}"
        folder.write_provenance(merged_provenance(self.records, command=command, recipe=self.recipe))

    def curve_table(self) -> list[Row]:
        """Bits per byte and perplexity of every variant, seed and length, for display."""
        return [
            {"variant": result.variant, "seed": result.seed, "length": length, "bits_per_byte": bits}
            | {"perplexity": 2.0**bits}
            for result in self.results
            for length, bits in result.curve.items()
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
            f"- {seeds} at scale `{self.recipe.scale}`; {sum(r.seconds for r in self.records.values()):.0f} s on "
            f"{self.results[0].record.device}. The prior's learning rate was chosen on these same held-out files, so "
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


def _key_only(network: Decoder, length: int) -> Tensor:
    priors = (block.attention.prior for block in network.blocks)
    return torch.stack([key_only_part(cast("SumPrior", prior), length) for prior in priors])


def _curve_rows(curve: list[Row]) -> list[Row]:
    """Tidy rows of :func:`length_curve`."""
    rows: list[Row] = []
    for row in curve:
        place = {"panel": "a", "length": row["length"], "count": row["windows"]}
        bits = {"quantity": "bits_per_byte", "unit": "bits", "value": row["bits_per_byte"]}
        rows.append(place | bits | {"standard_error": row["standard_error"]})
        rows.append(place | {"quantity": "perplexity", "unit": "per byte", "value": row["perplexity"]})
    return rows


def _rows(result: VariantResult) -> list[Row]:
    rows: list[Row] = []

    def add(panel: str, quantity: str, unit: str, value: float, **where: float) -> None:
        columns = ("length", "block", "head", "position", "score_range", "step", "standard_error", "count")
        place = {name: where.get(name, "") for name in columns}
        rows.append({"figure": FIGURE, "panel": panel, "variant": result.variant, "seed": result.seed} | place)
        rows[-1] |= {"quantity": quantity, "unit": unit, "value": value}

    for row in result.record.rows:
        add(**row)
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
    add("training", "wall_seconds", "seconds", result.record.seconds)
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
