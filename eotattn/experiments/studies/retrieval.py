"""Figure 3: who still finds a passkey and a needle in contexts many times longer than those of training?

Legend: S seeds, N lengths, D depths, H heads, T lags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eotattn.experiments.examination import examine
from eotattn.experiments.networks import ATTENTION_KINDS, Decoder, DecoderConfig
from eotattn.experiments.rate_sweep import best_rate, describe_rates, run_name, sweep_table, swept_runs
from eotattn.experiments.recipes.retrieval import RetrievalRecipe
from eotattn.experiments.records import Measurement, Record, Records, Row, Run, merged_provenance
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.tasks import RetrievalTask
from eotattn.experiments.training import TrainingConfig, autocast, train, training_rows

__all__ = ["SCORES", "RetrievalRun", "RetrievalStudy", "learned_log_prior", "measure", "runs"]

FIGURE = "fig3_retrieval"

#: Task -> what the paper reports of it.
SCORES = {"passkey": "exact_match", "needle": "token_accuracy"}


@dataclass(frozen=True)
class RetrievalRun:
    """One decoder, trained and examined.

    Args:
        decoder: The network.
        task: The data.
        training: The run.
        lengths: Examined contexts, tokens.
        depths: Examined depths.
        count: Sequences examined a task, length and depth.
        also_read_as: Kinds of attention that are trained as this one, examined with its weights.
    """

    decoder: DecoderConfig
    task: RetrievalTask
    training: TrainingConfig
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    count: int
    also_read_as: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """Seed of weights and batches."""
        return self.training.seed


def runs(recipe: RetrievalRecipe, records: Records) -> list[Run]:
    """For every variant that trains one run a rate with the first seed, then its other seeds at the best rate."""
    trained = {decoder.attention: decoder for decoder in recipe.variants if decoder.kind.trained_as is None}
    found = []
    for seed, name, rate in swept_runs(recipe, records, list(trained)):
        if seed in recipe.seeds_of(name):
            factor = trained[name].kind.prior_rate_factor
            training = recipe.training.at(rate, seed=seed, prior_rate_factor=factor)
            also = tuple(other.attention for other in recipe.variants if other.kind.trained_as == name)
            examined = (recipe.lengths, recipe.depths, recipe.count, also)
            run = RetrievalRun(trained[name], recipe.task, training, *examined)
            found.append(Run(run_name(name, rate, seed), run, measure))
    return found


def measure(run: RetrievalRun, checkpoint: Path) -> Measurement:
    """Train a decoder on both tasks and examine it at every length and depth, also as what else reads its weights.

    Args:
        run: What to do.
        checkpoint: File of the unfinished training.
    """
    network = Decoder(run.decoder)
    label = f"{run.decoder.attention}, rate {run.training.learning_rate:g}, seed {run.seed}"
    training = train(network, run.task, run.training, label=label, checkpoint=checkpoint)
    rows: list[Row] = []
    with autocast(run.training, next(network.parameters()).device):
        for variant in (run.decoder.attention, *run.also_read_as):
            reader = network.read_as(variant)
            found = examine(reader, run.task.haystacks, lengths=run.lengths, depths=run.depths, count=run.count)
            rows += [{"variant": variant} | row for row in found]
    own = [row for row in rows if row["variant"] == run.decoder.attention]
    near, far = (_mean_score(own, length) for length in (run.lengths[0], run.lengths[-1]))
    rows += training_rows(training)
    rows.append({"quantity": "training_seconds", "unit": "seconds", "value": training.wall_seconds})
    arrays = {}
    if run.decoder.attention in ("goat", "paper_goat"):
        arrays["log_prior"] = learned_log_prior(network, 2 * run.decoder.train_length)
    summary = f"accuracy {near:.3f} at {run.lengths[0]} tokens, {far:.3f} at {run.lengths[-1]}"
    return Measurement(rows, arrays, summary)


@torch.no_grad()
def learned_log_prior(network: Decoder, length: int) -> NDArray[np.float32]:
    """(blocks, H, T) log-prior of the last of ``length`` queries at the lags 0 ... T - 1, with maximum zero, nats."""
    device = next(network.parameters()).device
    query = torch.tensor([length - 1], device=device)
    keys = torch.arange(length - 1, -1, -1, device=device)
    found = []
    for block in network.blocks:
        prior = block.attention.prior
        assert prior is not None
        log_prior = prior.dense(query, keys)[:, 0]
        found.append((log_prior - log_prior.amax(-1, keepdim=True)).cpu())
    return torch.stack(found).numpy().astype(np.float32)


def _mean_score(rows: Sequence[Row], length: int) -> float:
    """Mean over tasks and depths of what the paper reports."""
    return float(np.mean([r["value"] for r in rows if r["length"] == length and r["quantity"] == SCORES[r["task"]]]))


@dataclass(frozen=True, eq=False)
class RetrievalStudy:
    """All decoders of figure 3.

    Attributes:
        recipe: What was run.
        records: Of all its runs.
    """

    recipe: RetrievalRecipe
    records: Records

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the decoders."""
        return tuple(decoder.attention for decoder in self.recipe.variants)

    @property
    def _trained(self) -> list[str]:
        return [name for name in self.variants if ATTENTION_KINDS[name].trained_as is None]

    def of(self, variant: str) -> list[Record]:
        """The records behind a variant at its best learning rate, by seed; those of RoPE behind the scaled kinds."""
        trained = ATTENTION_KINDS[variant].trained_as or variant
        rate = best_rate(self.recipe, self.records, trained)
        assert rate is not None
        return [self.records[run_name(trained, rate, seed)] for seed in self.recipe.seeds_of(trained)]

    def scores(self, variant: str, task: str, quantity: str | None = None) -> NDArray[np.float64]:
        """(S, N, D) accuracy of one variant by seed, length and depth.

        Args:
            variant: Name of its attention.
            task: ``"passkey"`` or ``"needle"``.
            quantity: ``"exact_match"`` or ``"token_accuracy"``; by default what the paper reports.
        """
        recipe, records = self.recipe, self.of(variant)
        found = np.full((len(records), len(recipe.lengths), len(recipe.depths)), np.nan)
        for s, record in enumerate(records):
            for row in record.rows_of(quantity or SCORES[task]):
                if row["task"] == task and row["variant"] == variant:
                    found[s, recipe.lengths.index(row["length"]), recipe.depths.index(row["depth"])] = row["value"]
        return found

    def rows(self) -> list[Row]:
        """The tidy table: every plotted value, one a row."""
        columns = ("panel", "task", "length", "depth", "step", "block", "head", "lag", "count", "quantity", "unit")
        rows = []
        for name, record in self.records.items():
            variant = name.split("-rate")[0]
            for row in record.rows:
                place = {"figure": FIGURE, "run": name, "variant": row.get("variant", variant), "seed": record.seed}
                rows.append(place | {column: row.get(column, "") for column in columns} | {"value": row["value"]})
            drawn = record is self.of("goat")[0]
            for place, value in self._prior_entries(record.arrays["log_prior"]) if drawn else ():
                entry = {"figure": FIGURE, "run": name, "variant": variant, "seed": record.seed}
                entry |= {column: place.get(column, "") for column in columns}
                rows.append(entry | {"panel": "c", "quantity": "log_prior", "unit": "nats", "value": value})
        return rows

    def _prior_entries(self, log_prior: NDArray[np.float32]) -> list[tuple[Row, float]]:
        """Every entry that panel (c) draws: all blocks and heads."""
        lags = shown_lags(log_prior.shape[-1])
        return [
            ({"block": b, "head": h, "lag": int(lag)}, float(log_prior[b, h, lag]))
            for b in range(log_prior.shape[0])
            for h in range(log_prior.shape[1])
            for lag in lags
        ]

    def save(self, folder: ResultFolder) -> None:
        """Write the table and its provenance."""
        folder.write_table(self.rows())
        command = f"eotattn reproduce --figure 3 --scale {self.recipe.scale}"
        folder.write_provenance(merged_provenance(self.records, command=command, recipe=self.recipe))

    def accuracy_table(self) -> list[Row]:
        """Mean over depths of every variant, task and length, and its range over the seeds, for display."""
        rows = []
        for variant in self.variants:
            for task, quantity in SCORES.items():
                scores = self.scores(variant, task)
                for k, length in enumerate(self.recipe.lengths):
                    seeds = scores[:, k].mean(-1)
                    place = {"variant": variant, "task": task, "score": quantity, "length": length}
                    found = {"mean": seeds.mean(), "lowest seed": seeds.min(), "highest seed": seeds.max()}
                    rows.append(place | found | {"worst depth": scores[:, k].min()})
        return rows

    def sweep_table(self) -> list[Row]:
        """One row a variant that trains and learning rate, for display."""
        return sweep_table(self.recipe, self.records, self._trained)

    def verdict(self) -> str:
        """The claims, the numbers and whether they held, in Markdown."""
        recipe = self.recipe
        factor = max(factor for factor in recipe.length_factors if factor <= 16)
        at = recipe.length_factors.index(factor)
        lines = []
        for variant in ("goat", "paper_goat"):
            for task, quantity in SCORES.items():
                scores = self.scores(variant, task)[:, at]
                lines.append(
                    f"- **{_NAMES[variant]}, {task}, {factor}x: {_held(scores.min() >= 0.99)}** (every seed and depth "
                    f"at least 0.99). {quantity.replace('_', ' ')}: mean {scores.mean():.3f}, worst seed and depth "
                    f"{scores.min():.3f}."
                )
        lines += [self._against("goat", "alibi"), self._against("paper_goat", "alibi")]
        for variant in [name for name in self.variants if name not in ("goat", "paper_goat", "alibi")]:
            near, far = ([self.scores(variant, task)[:, k].mean() for task in SCORES] for k in (0, at))
            lines.append(
                f"- {variant}: passkey {near[0]:.3f}, needle {near[1]:.3f} at the training length; "
                f"{far[0]:.3f} and {far[1]:.3f} at {factor}x."
            )
        count = len(recipe.seeds)
        devices = sorted({record.device for record in self.records.values()})
        rates = describe_rates(recipe, self.records, self._trained)
        where = f"at scale `{recipe.scale}` on {', '.join(devices)}"
        lines.append(f"- {count} seed{'s' if count > 1 else ''} {where}; {rates}.")
        return "\n".join(lines)

    def _against(self, variant: str, other: str) -> str:
        """Whether a variant is nowhere below another, by task and length, mean over seeds and depths."""
        gaps = {
            (task, length): self.scores(variant, task)[:, k].mean() - self.scores(other, task)[:, k].mean()
            for task in SCORES
            for k, length in enumerate(self.recipe.lengths)
        }
        (task, length), gap = min(gaps.items(), key=lambda item: item[1])
        return (
            f"- **{_NAMES[variant]} never below ALiBi: {_held(gap >= 0)}.** Smallest difference of the means over "
            f"seeds and depths: {gap:+.3f} ({task}, {length} tokens)."
        )


_NAMES = {"goat": "GOAT", "paper_goat": "GOAT in the paper's form"}


def shown_lags(count: int) -> list[int]:
    """Lags that a curve over 0 ... count - 1 is drawn at: all short ones, then about forty an octave."""
    grid = {round(float(lag)) for lag in np.geomspace(1, count - 1, 96)}
    return sorted({*range(min(32, count)), *grid})


def _held(condition: bool) -> str:
    return "held" if condition else "did NOT hold"
