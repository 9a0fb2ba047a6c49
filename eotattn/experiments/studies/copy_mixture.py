"""Figure 1: does a neutral prior learn where a copy mixture copies from?

Legend: H heads, L tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from eotattn.diagnostics.gauge import centre_rows
from eotattn.experiments.evaluation import watch_sinks
from eotattn.experiments.intervals import SeedInterval
from eotattn.experiments.networks import CopyReader, CopyReaderConfig
from eotattn.experiments.prior_parts import PriorParts, split_prior
from eotattn.experiments.recipes import CopyMixtureRecipe
from eotattn.experiments.records import Measurement, Record, Records, Row, Run, merged_provenance
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.tasks import CopyMixture
from eotattn.experiments.training import Evaluate, TrainingConfig, train, training_rows

__all__ = [
    "CopyMixtureStudy",
    "HeadFindings",
    "ReaderRun",
    "TrainedReader",
    "correlation",
    "measure",
    "measure_head",
    "runs",
]

FIGURE = "fig1_copy_mixture"

#: Correlation with the ideal log-prior that is asked for.
BOUND = 0.95


@dataclass(frozen=True)
class HeadFindings:
    """What one head's log-prior shows; gaps in nats. Panels (a) and (b) in the gauge without key slope.

    Attributes:
        head: Index.
        top_key: Position where the key-only part is highest.
        key_gap: u there minus the second highest.
        top_lag: Lag where the relative part is highest, counted from the predicted token, so that 1 is its neighbour.
        lag_gap: kappa there minus the second highest.
        deepest_trough: Lowest entry of the row-centred log-prior.
        negative_share: Share of the pairs that the task never copies from whose row-centred log-prior is negative.
        correlation: Pearson correlation with the ideal log-prior, both row-centred, over admissible pairs.
        copied_mass: Mean mass of the induced prior on the two source keys; the ideal is one.
        total_variation: Mean total-variation distance of its rows to the ideal attention; the uniform prior has
            ``uniform_total_variation``.
        uniform_total_variation: The same for the uniform causal prior.
    """

    head: int
    top_key: int
    key_gap: float
    top_lag: int
    lag_gap: float
    deepest_trough: float
    negative_share: float
    correlation: float
    copied_mass: float
    total_variation: float
    uniform_total_variation: float

    @property
    def claim_held(self) -> bool:
        """Whether this head's key-only part peaks at the first token, its relative part at lag one, with troughs."""
        return self.top_key == 0 and self.top_lag == 1 and self.deepest_trough < 0


@dataclass(frozen=True)
class ReaderRun:
    """One reader, trained and read: the sizes of data and network, and the run.

    Args:
        task: The data.
        network: The reader.
        training: The run.
        test_sequences: Fresh sequences that the final loss is measured on.
    """

    task: CopyMixture
    network: CopyReaderConfig
    training: TrainingConfig
    test_sequences: int

    @property
    def seed(self) -> int:
        """Seed of weights and batches."""
        return self.training.seed


def runs(recipe: CopyMixtureRecipe, records: Records) -> list[Run]:
    """One run a seed."""
    trainings = [replace(recipe.training, seed=seed) for seed in recipe.seeds]
    readers = [ReaderRun(recipe.task, recipe.network, training, recipe.test_sequences) for training in trainings]
    return [Run(f"goat-seed{reader.seed}", reader, measure) for reader in readers]


def measure(run: ReaderRun, checkpoint: Path) -> Measurement:
    """Train a reader on the copy mixture and read its log-prior.

    Args:
        run: What to do.
        checkpoint: File of the unfinished training.
    """
    network = CopyReader(run.network)
    label = f"copy mixture, seed {run.seed}"
    training = train(network, run.task, run.training, label=label, evaluate=_watch(network, run), checkpoint=checkpoint)
    device = next(network.parameters()).device
    # Training stops at step `steps`, so this batch is new to the network.
    fresh = run.task.batch(run.test_sequences, seed=run.seed, step=run.training.steps)
    with torch.no_grad():
        logits = network(fresh.inputs.to(device)).float().cpu()
    loss = float(functional.cross_entropy(logits.flatten(0, 1), fresh.targets.flatten()))
    best = run.task.best_loss(fresh)
    parts = split_prior(network.prior, run.task.length).without_key_slope()
    rows: list[Row] = [
        {"panel": "finding", "quantity": "loss", "unit": "nats per token", "value": loss},
        {"panel": "finding", "quantity": "best_loss", "unit": "nats per token", "value": best},
    ]
    rows += training_rows(training)
    for row in training.evaluations:
        mass = sum(sum(heads) for heads in row["sink_mass"]) / run.network.num_heads
        place = {"panel": "e", "step": row["step"]}
        rows.append(place | {"quantity": "mass_on_first_token", "unit": "probability", "value": mass})
        rows.append(place | {"quantity": "correlation", "unit": "dimensionless", "value": row["correlation"]})
    arrays = {name: getattr(parts, name).numpy() for name in ("key_only", "relative", "total")}
    return Measurement(rows, arrays, summary=f"loss {loss:.4f}, at best {best:.4f}")


def _watch(network: CopyReader, run: ReaderRun) -> Evaluate:
    """An evaluation hook: the mass on the first token, and how close the log-prior is to the ideal one."""
    tokens = run.task.batch(16, seed=run.seed, step=run.training.steps).inputs
    sinks, ideal = watch_sinks(network, tokens), run.task.ideal_log_prior()

    def watch(bare: nn.Module, step: int) -> list[Row]:
        total = split_prior(network.prior, run.task.length).total
        found = [correlation(head, ideal) for head in total]
        return [row | {"correlation": sum(found) / len(found)} for row in sinks(bare, step)]

    return watch


@dataclass(frozen=True, eq=False)
class TrainedReader:
    """One seed's log-prior and what it shows.

    Attributes:
        record: Of the run.
        parts: The learned log-prior, in the gauge without key slope.
        heads: Findings, one a head.
    """

    record: Record
    parts: PriorParts
    heads: tuple[HeadFindings, ...]

    @classmethod
    def of(cls, record: Record, ideal: torch.Tensor) -> TrainedReader:
        """Read a record.

        Args:
            record: Of a run of this study.
            ideal: (L, L) ideal log-prior, -inf above the diagonal, nats.
        """
        parts = PriorParts(**{name: torch.as_tensor(array) for name, array in record.arrays.items()})
        return cls(record, parts, tuple(measure_head(parts, ideal, head) for head in range(parts.total.shape[0])))

    def rows(self) -> list[Row]:
        """The tidy table of this seed: every plotted value and every finding, one a row."""
        rows: list[Row] = []

        def add(panel: str, quantity: str, unit: str, value: float | torch.Tensor, **where: int) -> None:
            place = {name: where.get(name, "") for name in ("head", "query", "key", "lag", "step")}
            rows.append({"figure": FIGURE, "panel": panel, "variant": "goat", "seed": self.record.seed} | place)
            rows[-1] |= {"quantity": quantity, "unit": unit, "value": float(value)}

        length = self.parts.total.shape[-1]
        centred, induced = centre_rows(self.parts.total), self.parts.total.softmax(-1)
        for h, findings in enumerate(self.heads):
            for j in range(length):
                add("a", "key_only_log_prior", "nats", self.parts.key_only[h, j], head=h, key=j)
            for t in range(length):
                add("b", "relative_log_prior", "nats", self.parts.relative[h, t], head=h, lag=t + 1)
            for i in range(length):
                for j in range(i + 1):
                    add("c", "row_centred_log_prior", "nats", centred[h, i, j], head=h, query=i, key=j)
                    add("d", "induced_prior", "probability", induced[h, i, j], head=h, query=i, key=j)
            for name, value in asdict(findings).items():
                if name != "head":
                    add("finding", name, _UNITS[name], value, head=h)
        for row in self.record.rows:
            add(**row)
        return rows


@dataclass(frozen=True, eq=False)
class CopyMixtureStudy:
    """Trained readers' log-priors and what they show.

    Attributes:
        recipe: What was run.
        records: Of all its runs.
    """

    recipe: CopyMixtureRecipe
    records: Records

    @cached_property
    def readers(self) -> tuple[TrainedReader, ...]:
        """One a seed."""
        ideal = self.recipe.task.ideal_log_prior()
        return tuple(TrainedReader.of(self.records[f"goat-seed{seed}"], ideal) for seed in self.recipe.seeds)

    def rows(self) -> list[Row]:
        """The tidy table: every plotted value and every finding, one a row."""
        return [row for reader in self.readers for row in reader.rows()]

    def save(self, folder: ResultFolder) -> None:
        """Write the table and its provenance."""
        folder.write_table(self.rows())
        command = f"eotattn reproduce --figure 1 --scale {self.recipe.scale}"
        folder.write_provenance(merged_provenance(self.records, command=command, recipe=self.recipe))

    def findings_table(self) -> list[Row]:
        """Findings as rows, one a seed and head, for display."""
        return [{"seed": reader.record.seed} | asdict(head) for reader in self.readers for head in reader.heads]

    def loss_table(self) -> list[Row]:
        """Training loss against step, one row a seed and logged step, for display."""
        return [
            {"seed": reader.record.seed, "step": row["step"], "loss": row["value"]}
            for reader in self.readers
            for row in reader.record.rows_of("training_loss")
        ]

    def verdict(self) -> str:
        """The claims, the numbers and whether they held, in Markdown; the interval is of 95 % over seeds."""
        recovered = [all(head.claim_held for head in reader.heads) for reader in self.readers]
        close = [head.correlation for reader in self.readers for head in reader.heads]
        lines = [
            f"- **The planted structure is recovered: {_held(all(recovered))}**, in {sum(recovered)} of "
            f"{len(recovered)} seeds: the key-only part is highest at the first token, the relative part at lag one, "
            f"and there are troughs elsewhere.",
            f"- **Correlation with the ideal log-prior above {BOUND}, row-centred, in every seed: "
            f"{_held(min(close) > BOUND)}.** {SeedInterval.of(close):.4f} over seeds; the lowest is {min(close):.4f}.",
        ]
        return "\n".join(lines + [line for reader in self.readers for line in self._verdict_of(reader)])

    def _verdict_of(self, reader: TrainedReader) -> list[str]:
        lines = [
            f"- Seed {reader.record.seed}, head {found.head}: the key-only part is highest at position "
            f"{found.top_key} ({found.key_gap:.2f} nats above the next), the relative part at lag {found.top_lag} "
            f"({found.lag_gap:.2f} nats above the next). The deepest trough of the row-centred sum is "
            f"{found.deepest_trough:.2f} nats, and {found.negative_share:.0%} of the pairs that are never copied are "
            f"negative. Correlation with the ideal log-prior: {found.correlation:.4f}. The induced prior puts "
            f"{found.copied_mass:.0%} of its mass on the two sources; its total-variation distance to the ideal "
            f"attention is {found.total_variation:.3f} (uniform prior: {found.uniform_total_variation:.3f})."
            for found in reader.heads
        ]
        loss, best = (reader.record.value(name) for name in ("loss", "best_loss"))
        lines.append(
            f"- Seed {reader.record.seed}: loss on fresh sequences {loss:.4f} nats a token, {loss - best:.4f} above "
            f"the generator's own {best:.4f}; {reader.record.seconds:.0f} s on {reader.record.device}."
        )
        return lines


def _held(condition: bool) -> str:
    return "held" if condition else "did NOT hold"


_UNITS = {
    "top_key": "tokens",
    "key_gap": "nats",
    "top_lag": "tokens",
    "lag_gap": "nats",
    "deepest_trough": "nats",
    "negative_share": "fraction",
    "correlation": "dimensionless",
    "copied_mass": "probability",
    "total_variation": "probability",
    "uniform_total_variation": "probability",
}


def measure_head(parts: PriorParts, ideal: torch.Tensor, head: int) -> HeadFindings:
    """Compare one head's log-prior with the ideal one.

    Args:
        parts: Learned log-prior, see :class:`PriorParts`.
        ideal: (L, L) ideal log-prior, -inf above the diagonal, nats; rows 0 and 1 have no key that is never copied.
        head: Index.
    """
    total = parts.total[head]
    length = total.shape[-1]
    admissible = torch.ones(length, length, dtype=torch.bool).tril()
    unused = admissible & ~torch.eye(length, dtype=torch.bool)
    unused[:, 0] = False
    centred = centre_rows(total)
    induced, target = total.softmax(-1), ideal.softmax(-1)
    uniform = admissible / admissible.sum(-1, keepdim=True)
    top_keys, top_lags = parts.key_only[head].topk(2), parts.relative[head].topk(2)
    return HeadFindings(
        head=head,
        top_key=int(top_keys.indices[0]),
        key_gap=float(top_keys.values[0] - top_keys.values[1]),
        top_lag=int(top_lags.indices[0]) + 1,
        lag_gap=float(top_lags.values[0] - top_lags.values[1]),
        deepest_trough=float(centred[admissible].min()),
        negative_share=float((centred[unused] < 0).double().mean()),
        correlation=correlation(total, ideal),
        copied_mass=float(induced.masked_fill(unused, 0.0).sum(-1).mean()),
        total_variation=float((induced - target).abs().sum(-1).mean() / 2),
        uniform_total_variation=float((uniform - target).abs().sum(-1).mean() / 2),
    )


def correlation(log_prior: torch.Tensor, ideal: torch.Tensor) -> float:
    """Pearson correlation of two (L, L) causal log-priors over admissible pairs, row-centred; NaN if one is flat."""
    admissible = torch.ones_like(ideal, dtype=torch.bool).tril()
    pair = torch.stack([centre_rows(log_prior)[admissible], centre_rows(ideal)[admissible]])
    return float(torch.corrcoef(pair)[0, 1]) if bool(pair.std(-1).min() > 0) else math.nan
