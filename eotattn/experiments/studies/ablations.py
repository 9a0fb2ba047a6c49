"""The ablations: which prior is good in distribution and far beyond it, on language and on retrieval alike?

Legend: S seeds, N lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eotattn.experiments.evaluation import target_bits
from eotattn.experiments.examination import examine
from eotattn.experiments.networks import ATTENTION_KINDS, Decoder, DecoderConfig
from eotattn.experiments.recipes.ablations import VARIANTS, AblationRecipe
from eotattn.experiments.records import Measurement, Records, Row, Run, merged_provenance
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.tasks import LanguageTask, RetrievalTask
from eotattn.experiments.tasks.retrieval import ALPHABET
from eotattn.experiments.training import TrainingConfig, autocast, train, training_rows

__all__ = [
    "AblationStudy",
    "LanguageAblation",
    "RetrievalAblation",
    "measure_language",
    "measure_retrieval",
    "runs",
]

FIGURE = "ablations"

#: Mean accuracy that counts as retrieving nearly everything.
KEPT = 0.99

#: Judge -> what it measures; for language less is better.
JUDGES = {"language": "bits_per_byte", "passkey": "exact_match", "needle": "token_accuracy"}


@dataclass(frozen=True)
class LanguageAblation:
    """One decoder, trained and measured on language.

    Args:
        decoder: The network.
        corpus: As in :func:`eotattn.experiments.tasks.find_texts`.
        training: The run.
        lengths: Examined contexts, tokens.
        windows: Held-out windows.
        also_read_as: Kinds of attention that are trained as this one, measured with its weights.
    """

    decoder: DecoderConfig
    corpus: str
    training: TrainingConfig
    lengths: tuple[int, ...]
    windows: int
    also_read_as: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """Seed of weights and batches."""
        return self.training.seed


@dataclass(frozen=True)
class RetrievalAblation:
    """One decoder, trained and examined on retrieval.

    Args:
        decoder: The network.
        training: The run.
        lengths: Examined contexts, tokens.
        depths: Examined depths.
        count: Sequences examined a task, length and depth.
        also_read_as: Kinds of attention that are trained as this one, examined with its weights.
    """

    decoder: DecoderConfig
    training: TrainingConfig
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    count: int
    also_read_as: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """Seed of weights and batches."""
        return self.training.seed


def runs(recipe: AblationRecipe, records: Records) -> list[Run]:
    """Two runs a seed and variant that trains, one a task; the first seed's come first."""
    found = []
    for seed in recipe.seeds:
        for decoder in recipe.decoders:
            if decoder.kind.trained_as is not None or seed not in recipe.seeds_of(decoder.attention):
                continue
            also = tuple(other.attention for other in recipe.decoders if other.kind.trained_as == decoder.attention)
            factor = decoder.kind.prior_rate_factor
            language, retrieval = (
                training.at(training.learning_rate, seed=seed, prior_rate_factor=factor)
                for training in (recipe.language, recipe.retrieval)
            )
            reader = replace(decoder, vocabulary_size=256)
            finder = replace(decoder, vocabulary_size=len(ALPHABET))
            name = f"{decoder.attention}-seed{seed}"
            on_language = LanguageAblation(reader, recipe.corpus, language, recipe.lengths, recipe.windows, also)
            on_retrieval = RetrievalAblation(finder, retrieval, recipe.lengths, recipe.depths, recipe.count, also)
            found += [
                Run(f"language-{name}", on_language, measure_language),
                Run(f"retrieval-{name}", on_retrieval, measure_retrieval),
            ]
    return found


def measure_language(run: LanguageAblation, checkpoint: Path) -> Measurement:
    """Train a decoder on bytes and measure the last bytes of held-out windows at every length.

    Args:
        run: What to do.
        checkpoint: File of the unfinished training.
    """
    task = LanguageTask.from_corpus(run.corpus, length=run.decoder.train_length)
    windows = task.held_out_windows(run.lengths[-1], run.windows)  # fails before any training
    network = Decoder(run.decoder)
    training = train(network, task, run.training, label=f"{run.decoder.attention}, language", checkpoint=checkpoint)
    rows: list[Row] = []
    with autocast(run.training, next(network.parameters()).device):
        for variant in (run.decoder.attention, *run.also_read_as):
            reader = network.read_as(variant)
            for length in run.lengths:
                bits = target_bits(reader, windows, length=length, num_targets=run.decoder.train_length)
                place = {"variant": variant, "task": "language", "length": length, "count": run.windows, "unit": "bits"}
                rows.append({"quantity": JUDGES["language"], "value": float(bits.mean())} | place)
    summary = "bits per byte " + ", ".join(f"{row['value']:.3f}" for row in rows[: len(run.lengths)])
    return Measurement(rows + training_rows(training), summary=summary)


def measure_retrieval(run: RetrievalAblation, checkpoint: Path) -> Measurement:
    """Train a decoder on passkeys and needles and examine it at every length and depth.

    Args:
        run: What to do.
        checkpoint: File of the unfinished training.
    """
    task = RetrievalTask(run.decoder.train_length)
    network = Decoder(run.decoder)
    training = train(network, task, run.training, label=f"{run.decoder.attention}, retrieval", checkpoint=checkpoint)
    rows: list[Row] = []
    with autocast(run.training, next(network.parameters()).device):
        for variant in (run.decoder.attention, *run.also_read_as):
            reader = network.read_as(variant)
            found = examine(reader, task.haystacks, lengths=run.lengths, depths=run.depths, count=run.count)
            rows += [{"variant": variant} | row for row in found]
    own = [row for row in rows if row["variant"] == run.decoder.attention]
    means = []
    for length in run.lengths:
        scored = [r["value"] for r in own if r["length"] == length and r["quantity"] == JUDGES[r["task"]]]
        means.append(f"{np.mean(scored):.3f}")
    return Measurement(rows + training_rows(training), summary="accuracy " + ", ".join(means))


@dataclass(frozen=True, eq=False)
class AblationStudy:
    """All variants on both tasks.

    Attributes:
        recipe: What was run.
        records: Of all its runs.
    """

    recipe: AblationRecipe
    records: Records

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants."""
        return tuple(decoder.attention for decoder in self.recipe.decoders)

    def values(self, variant: str, judge: str) -> NDArray[np.float64]:
        """(S, N) what a judge measured, by seed and length, mean over depths.

        Args:
            variant: Name of the attention.
            judge: ``"language"`` (bits per byte), ``"passkey"`` or ``"needle"`` (accuracy).
        """
        task = "language" if judge == "language" else "retrieval"
        trained = ATTENTION_KINDS[variant].trained_as or variant
        found = []
        for seed in self.recipe.seeds_of(trained):
            rows = self.records[f"{task}-{trained}-seed{seed}"].rows_of(JUDGES[judge])
            mine = [row for row in rows if row["task"] == judge and row["variant"] == variant]
            by_length = [[row["value"] for row in mine if row["length"] == length] for length in self.recipe.lengths]
            found.append([float(np.mean(values)) for values in by_length])
        return np.array(found)

    def retrieval(self, variant: str) -> NDArray[np.float64]:
        """(S, N) mean of passkey and needle."""
        return (self.values(variant, "passkey") + self.values(variant, "needle")) / 2

    def rows(self) -> list[Row]:
        """The tidy table: every measurement, one a row."""
        columns = ("task", "length", "depth", "step", "count", "quantity", "unit")
        found = []
        for name, record in self.records.items():
            task, rest = name.split("-", 1)
            trained = rest.rsplit("-seed", 1)[0]
            for row in record.rows:
                place = {"figure": FIGURE, "variant": row.get("variant", trained), "seed": record.seed}
                named = {column: row.get(column, "") for column in columns} | {"task": row.get("task", task)}
                found.append(place | named | {"value": row["value"]})
        return found

    def save(self, folder: ResultFolder) -> None:
        """Write the table and its provenance."""
        folder.write_table(self.rows())
        command = f"eotattn reproduce --figure ablations --scale {self.recipe.scale}"
        folder.write_provenance(merged_provenance(self.records, command=command, recipe=self.recipe))

    def table(self) -> list[Row]:
        """One row a variant, for display: each judge at the training length and at the longest, mean over seeds."""
        near, far = self.recipe.length_factors[0], self.recipe.length_factors[-1]
        found = []
        for variant in self.variants:
            row: Row = {"variant": variant, "made of": VARIANTS[variant]}
            for judge in JUDGES:
                values = self.values(variant, judge)
                row |= {f"{judge} {near}x": values[:, 0].mean(), f"{judge} {far}x": values[:, -1].mean()}
                row[f"{judge} {far}x worst seed"] = values[:, -1].max() if judge == "language" else values[:, -1].min()
            found.append(row)
        return found

    def answers(self) -> list[str]:
        """Variants that answer the question: as good as RoPE at the training length and as ALiBi at the longest.

        Both on language (bits per byte) and on retrieval (mean of both tasks), means over seeds.
        """
        rope, alibi = (self._summary(name) for name in ("rope", "alibi"))
        found = []
        for variant in self.variants:
            near_bits, far_bits, near_found, far_found = self._summary(variant)
            as_rope = near_bits <= rope[0] and near_found >= rope[2]
            as_alibi = far_bits <= alibi[1] and far_found >= alibi[3]
            if as_rope and as_alibi and variant not in ("rope", "alibi"):
                found.append(variant)
        return found

    def keepers(self) -> list[str]:
        """Those answers that retrieve nearly everything at the longest context too."""
        return [name for name in self.answers() if self._summary(name)[3] >= KEPT]

    def _summary(self, variant: str) -> tuple[float, float, float, float]:
        """Bits per byte near and far, retrieval near and far."""
        bits, found = self.values(variant, "language").mean(0), self.retrieval(variant).mean(0)
        return float(bits[0]), float(bits[-1]), float(found[0]), float(found[-1])

    def verdict(self) -> str:
        """The question, the answer and its numbers, in Markdown."""
        answers, far = self.answers(), self.recipe.length_factors[-1]
        named = ", ".join(f"`{name}`" for name in answers) if answers else "none of these variants"
        lines = [
            f"- **Which trainable prior extrapolates at least as well as ALiBi and is at least as good in distribution "
            f"as RoPE, on language and on retrieval? {named[0].upper() + named[1:]}.**"
        ]
        if answers:
            kept = ", ".join(f"`{name}`" for name in self.keepers()) or "none"
            lines.append(f"- Of these, retrieval at {far}x is at least {KEPT} (ALiBi's is no high bar) with: {kept}.")
        shown = dict.fromkeys(name for name in ("rope", "alibi", "paper_goat", "goat", "local_rotary_goat", *answers))
        for name in shown:
            if name in self.variants:
                near_bits, far_bits, near_found, far_found = self._summary(name)
                lines.append(
                    f"- `{name}`: {near_bits:.3f} bits per byte at the training length and {far_bits:.3f} at {far}x; "
                    f"retrieval {near_found:.3f} and {far_found:.3f}."
                )
        lines += self._rankings(far)
        count = len(self.recipe.seeds)
        devices = sorted({record.device for record in self.records.values()})
        once = [name for name in self.variants if len(self.values(name, "language")) < count]
        but = f", one of {', '.join(f'`{name}`' for name in once)}" if once else ""
        lines.append(
            f"- {count} seed{'s' if count > 1 else ''}{but} at scale `{self.recipe.scale}` on {', '.join(devices)}."
        )
        return "\n".join(lines)

    def _rankings(self, far: int) -> list[str]:
        """The best three variants by each of the four numbers."""
        quantities = (
            ("bits per byte at the training length", 0, False),
            (f"bits per byte at {far}x", 1, False),
            ("retrieval at the training length", 2, True),
            (f"retrieval at {far}x", 3, True),
        )
        lines = []
        summaries = {name: self._summary(name) for name in self.variants}
        for what, k, high in quantities:
            ranked = sorted(((summary[k], name) for name, summary in summaries.items()), reverse=high)
            best = ", ".join(f"`{name}` {value:.3f}" for value, name in ranked[:3])
            lines.append(f"- Best in {what}: {best}.")
        return lines
