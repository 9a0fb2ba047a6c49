"""Figure 2's study: what the records of its runs say, as tables.

Legend: A blocks, H heads, N windows, S recorded steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eotattn.checks import require
from eotattn.diagnostics import SinkMassReport
from eotattn.experiments.intervals import SeedInterval
from eotattn.experiments.optimisation import TrainingConfig, learning_rate_factor
from eotattn.experiments.recipes.language import LanguageRecipe
from eotattn.experiments.records import Record, Records, Row, merged_provenance
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.studies.language import best_rate, sweep_runs

__all__ = ["FIGURE", "LanguageStudy", "TrainedDecoder"]

FIGURE = "fig2_language"


@dataclass(frozen=True, eq=False)
class TrainedDecoder:
    """What was measured on one trained decoder.

    Attributes:
        variant: Name of its attention.
        record: Of the run.
    """

    variant: str
    record: Record

    def curve(self, kind: str | None = None) -> dict[int, float]:
        """Context length -> bits per byte, read as another kind if one is named."""
        rows = self.record.rows_of("bits_per_byte")
        return {row["length"]: row["value"] for row in rows if row["variant"] == (kind or self.variant)}

    @property
    def sinks(self) -> SinkMassReport:
        """Sink mass against signal strength, all blocks together, averaged over the heads of a block."""
        return SinkMassReport(**{f.name: self.record.arrays[f"sinks.{f.name}"] for f in fields(SinkMassReport)})

    @property
    def formation(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps (S,), and the mass on the first token at each of them, (S, A, H)."""
        return self.record.arrays["formation.step"], self.record.arrays["formation.sink_mass"]

    @property
    def reach(self) -> float:
        """Sum of the learning rates of the log-prior over the run: what steps of one sign add up to, nats."""
        training = TrainingConfig(**self.record.configuration["training"])
        steps = range(training.steps)
        return training.prior_learning_rate * sum(learning_rate_factor(step, training) for step in steps)

    @property
    def key_only(self) -> Tensor | None:
        """(A, H, longest context) learned u(j) in nats, where the prior has one."""
        found = self.record.arrays.get("key_only")
        return None if found is None else torch.as_tensor(found)


@dataclass(frozen=True, eq=False)
class LanguageStudy:
    """All decoders of figure 2.

    Attributes:
        recipe: What was run.
        records: Of all its runs.

    Raises:
        ValueError: If the runs did not all read the same corpus.
    """

    recipe: LanguageRecipe
    records: Records

    def __post_init__(self) -> None:
        data = [record.provenance["data"] for record in self.records.values()]
        corpora = sorted({f"{each['sha256'][:12]} of {each['held_out_bytes']} held-out bytes" for each in data})
        remedy = "Make all runs on one machine: eotattn train --figure 2 --fresh"
        require(len(corpora) == 1, "LanguageStudy", "records", "come from one corpus", corpora, remedy)

    @cached_property
    def decoders(self) -> tuple[TrainedDecoder, ...]:
        """One a variant and seed, and the contrasts."""
        pairs = [(decoder.attention, seed) for seed in self.recipe.seeds for decoder in self.recipe.variants]
        pairs += [(decoder.attention, self.recipe.seeds[0]) for decoder in self.recipe.contrasts]
        return tuple(TrainedDecoder(variant, self.records[f"{variant}-seed{seed}"]) for variant, seed in pairs)

    @property
    def names(self) -> tuple[str, ...]:
        """Variants, contrasts and readings: every curve of panel (a)."""
        trained = [decoder.attention for decoder in self.recipe.variants + self.recipe.contrasts]
        return (*trained, *(kind for kind, _ in self.recipe.readings))

    @property
    def learned(self) -> tuple[str, ...]:
        """The variants whose prior has a key-only part."""
        return tuple(dict.fromkeys(d.variant for d in self.decoders if d.key_only is not None))

    @property
    def headline(self) -> tuple[str, ...]:
        """The learned ones among them that run with all seeds."""
        return tuple(d.attention for d in self.recipe.variants if d.attention in self.learned)

    @property
    def movable(self) -> str:
        """The learned one whose log-prior could move furthest, the last if several could."""
        return max(reversed(self.learned), key=lambda name: self.of(name)[0].reach)

    def of(self, name: str) -> tuple[TrainedDecoder, ...]:
        """The decoders behind a variant, contrast or reading, by seed."""
        variant = dict(self.recipe.readings).get(name, name)
        return tuple(decoder for decoder in self.decoders if decoder.variant == variant)

    def bits(self, name: str, length: int) -> list[float]:
        """Bits per byte at a context length, one a seed."""
        return [decoder.curve(name)[length] for decoder in self.of(name)]

    def interval(self, name: str, length: int) -> SeedInterval:
        """Bits per byte at a context length, over seeds."""
        return SeedInterval.of(self.bits(name, length))

    def saving(self, name: str, *, over: str, length: int) -> SeedInterval:
        """Bits per byte that ``name`` saves over another variant, seed by seed: they share start and batches."""
        pairs = zip(self.bits(name, length), self.bits(over, length), strict=True)
        return SeedInterval.of([theirs - ours for ours, theirs in pairs])

    def drift(self, name: str) -> SeedInterval:
        """Bits per byte at the longest context less those at the training length, seed by seed."""
        first, last = self.recipe.lengths[0], self.recipe.lengths[-1]
        pairs = zip(self.bits(name, first), self.bits(name, last), strict=True)
        return SeedInterval.of([far - near for near, far in pairs])

    @property
    def uniform_mass(self) -> float:
        """Mass on the first token if attention were uniform over the keys, for the queries of panel (d)."""
        queries = range(self.recipe.train_length // 2, self.recipe.train_length)
        return sum(1 / (query + 1) for query in queries) / len(queries)

    # Tables -------------------------------------------------------------------------------------------------------

    def curve_table(self) -> list[Row]:
        """Bits per byte, over seeds, of every curve and length, for display."""
        return [
            {"variant": name, "seeds": len(self.of(name)), "length": length, "bits_per_byte": f"{interval:.3f}"}
            for name in self.names
            for length in self.recipe.lengths
            for interval in [self.interval(name, length)]
        ]

    def sweep_table(self) -> list[Row]:
        """Bits per byte on validation files of every variant and rate, for display."""
        return [
            {
                "variant": decoder.attention,
                "learning_rate": rate,
                "bits_per_byte": self.records[run.name].value("bits_per_byte"),
                "chosen": rate == best_rate(self.recipe, self.records, decoder.attention),
            }
            for decoder in self.recipe.variants
            for rate, run in sweep_runs(self.recipe, decoder.attention).items()
        ]

    def cost_table(self) -> list[Row]:
        """Parameters and training time of every decoder, for display."""
        return [
            {"variant": decoder.variant, "seed": decoder.record.seed}
            | {name: decoder.record.value(name) for name in ("parameters", "training_seconds")}
            | {"learning_rate": decoder.record.configuration["training"]["learning_rate"]}
            for decoder in self.decoders
        ]

    def rows(self) -> list[Row]:
        """The tidy table: every plotted value, one a row."""
        swept = [
            self.records[run.name]
            for d in self.recipe.variants
            for run in sweep_runs(self.recipe, d.attention).values()
        ]
        rows = [_tidy(record.seed, row) for record in swept for row in record.rows]
        return rows + [row for decoder in self.decoders for row in _rows(decoder)]

    def save(self, folder: ResultFolder) -> None:
        """Write the table and its provenance."""
        folder.write_table(self.rows())
        command = f"eotattn reproduce --figure 2 --scale {self.recipe.scale}"
        folder.write_provenance(merged_provenance(self.records, command=command, recipe=self.recipe))


_COLUMNS = ("length", "learning_rate", "block", "position", "score_range", "step", "standard_error", "count")


def _tidy(seed: int, row: Row, variant: str = "") -> Row:
    """A row with all columns of the table."""
    what = {"figure": FIGURE, "panel": row["panel"], "variant": row.get("variant", variant), "seed": seed}
    place = {name: row.get(name, "") for name in _COLUMNS}
    return what | place | {name: row[name] for name in ("quantity", "unit", "value")}


def _rows(decoder: TrainedDecoder) -> list[Row]:
    rows: list[Row] = [*decoder.record.rows, *_formation_rows(decoder)]
    if decoder.key_only is not None:
        of_blocks = decoder.key_only.mean(1)
        length = of_blocks.shape[-1]
        positions = sorted({*range(min(length, 128)), *range(0, length, max(1, length // 256))})
        rows += [
            {"panel": "c", "quantity": "key_only_log_prior", "unit": "nats", "block": b, "position": j}
            | {"value": float(of_block[j])}
            for b, of_block in enumerate(of_blocks)
            for j in positions
        ]
    sinks = decoder.sinks
    rows += [
        {"panel": "d", "quantity": "sink_mass", "unit": "probability", "count": count}
        | {"score_range": float(sinks.mean_score_range[m]), "standard_error": float(sinks.standard_error[m])}
        | {"value": float(sinks.mean_sink_mass[m])}
        for m, count in enumerate(sinks.counts.tolist())
        if count > 0
    ]
    return [_tidy(decoder.record.seed, row, decoder.variant) for row in rows]


def _formation_rows(decoder: TrainedDecoder) -> list[Row]:
    """Mass on the first token by step and block, averaged over heads."""
    steps, mass = decoder.formation
    return [
        {"panel": "e", "quantity": "sink_mass", "unit": "probability", "step": int(step), "block": b, "value": float(m)}
        for step, blocks in zip(steps, mass.mean(-1), strict=True)
        for b, m in enumerate(blocks)
    ]


def mean_formation(decoders: Sequence[TrainedDecoder]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps (S,), and the mass on the first token averaged over blocks and heads, one row a seed."""
    steps = decoders[0].formation[0]
    return steps, np.stack([decoder.formation[1].mean((1, 2)) for decoder in decoders])
