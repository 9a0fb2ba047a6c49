"""Figure 3: who still finds a passkey and a needle in contexts many times longer than those of training?

From recipe to picture. Legend: S seeds, N lengths, D depths, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas
import torch
from numpy.typing import NDArray

from eotattn.experiments.examination import examine
from eotattn.experiments.intervals import SeedInterval, claim
from eotattn.experiments.networks import ATTENTION_KINDS, Decoder, DecoderConfig, display_name
from eotattn.experiments.rate_sweep import SweptStudy, swept_runs
from eotattn.experiments.records import Measurement, Records, Row, Run, TrainedRun, taken_from
from eotattn.experiments.scales import check_scale
from eotattn.experiments.study import Figure
from eotattn.experiments.tasks import RetrievalTask
from eotattn.experiments.tasks.retrieval import ALPHABET
from eotattn.experiments.training import TrainingConfig, TrainingResult, autocast, train, training_rows
from eotattn.plotting import mosaic, plot_depth_grid, plot_length_curves, plot_log_prior_by_lag, title_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

__all__ = ["FIGURE", "SCORES", "RetrievalRecipe", "RetrievalStudy", "draw", "measure", "recipe", "runs", "verdict"]

#: Task -> what the paper reports of it.
SCORES = {"passkey": "exact_match", "needle": "token_accuracy"}
#: Mean accuracy that counts as near-perfect, and a difference of accuracies that does not count.
NEAR_PERFECT, TOLERATED = 0.99, 0.01

# Recipe -------------------------------------------------------------------------------------------------------------

#: Decoders of the figure, in the order of legends.
VARIANTS = ("goat", "paper_goat", "alibi", "rope", "interpolated_rope", "ntk_rope", "sinusoidal")


@dataclass(frozen=True)
class RetrievalRecipe:
    """Figure 3.

    Args:
        scale: Name of the scale.
        task: The data; passkeys and needles take turns in every batch.
        variants: One decoder a curve; equal but for the attention.
        training: The run, once a seed and variant that trains, at the best rate; two kinds of scaled RoPE read the
            weights of RoPE.
        learning_rates: Rates that the first seed trains every variant at; all seeds take the one with the least
            training loss, whose data never repeat.
        seeds: Seeds of weights and batches.
        repeated: Variants that run with every seed; the others, for contrast, run with the first alone.
        length_factors: Examined contexts as multiples of the training length.
        depths: Examined depths, 0 to 1.
        count: Sequences examined a task, length and depth.
    """

    scale: str
    task: RetrievalTask
    variants: tuple[DecoderConfig, ...]
    training: TrainingConfig
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    repeated: tuple[str, ...]
    length_factors: tuple[int, ...]
    depths: tuple[float, ...]
    count: int

    @property
    def sweep_seeds(self) -> tuple[int, ...]:
        """The first seed tries the rates."""
        return self.seeds[:1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Examined contexts, tokens."""
        return tuple(factor * self.task.length for factor in self.length_factors)

    @property
    def trained(self) -> dict[str, DecoderConfig]:
        """Decoders that train, by name."""
        return {decoder.attention: decoder for decoder in self.variants if decoder.kind.trained_as is None}


PAPER_TRAINING = TrainingConfig(
    steps=2000, batch_size=32, warmup_steps=400, log_every=50, checkpoint_every=500, precision="bf16"
)
#: Scale -> training and rates.
TRAININGS = {
    "smoke": (TrainingConfig(steps=4, batch_size=4, warmup_steps=1, log_every=2), (1e-3, 3e-3)),
    "laptop": (
        TrainingConfig(steps=1200, batch_size=32, warmup_steps=100, log_every=50, checkpoint_every=400),
        (3e-3,),
    ),
    "h200": (PAPER_TRAINING, (1.5e-4, 3e-4, 6e-4, 1.2e-3)),
    "paper": (PAPER_TRAINING, (3e-4,)),
}


def recipe(scale: str = "laptop") -> RetrievalRecipe:
    """Figure 3 at a scale.

    ``"h200"`` and ``"paper"`` have the paper's decoder, steps, batch, training length and frequencies. There one
    network learns both tasks, half a batch each, where the paper trains one a task; ``"h200"`` tries
    rates from half of the paper's to four times that.

    Example:
        >>> recipe("laptop").lengths
        (64, 128, 256, 512, 1024)
    """
    check_scale("retrieval", scale)
    is_small = scale in ("smoke", "laptop")
    length = 64 if is_small else 256
    sizes: dict[str, Any] = {"num_layers": 12, "embed_dim": 512, "num_heads": 8}
    if is_small:
        sizes = {"num_layers": 2, "embed_dim": 64, "num_heads": 4}
    sizes |= {"train_length": length, "num_frequencies": 8}
    sizes |= {"min_period": 2 * math.pi, "max_period": 2 * math.pi * 10_000}
    training, rates = TRAININGS[scale]
    return RetrievalRecipe(
        scale=scale,
        task=RetrievalTask(length),
        variants=tuple(DecoderConfig(name, len(ALPHABET), **sizes) for name in VARIANTS),
        training=training,
        learning_rates=rates,
        seeds=(0,) if is_small else (0, 1, 2),
        repeated=("goat", "paper_goat", "alibi"),
        length_factors={"smoke": (1, 2), "laptop": (1, 2, 4, 8, 16)}.get(scale, (1, 2, 4, 8, 16, 32)),
        depths=(0.1, 0.9) if scale == "smoke" else (0.1, 0.3, 0.5, 0.7, 0.9),
        count={"smoke": 4}.get(scale, 32),
    )


# Runs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RetrievalRun(TrainedRun):
    """One decoder, trained and examined, also as the kinds of attention that are trained as this one."""

    decoder: DecoderConfig
    task: RetrievalTask
    training: TrainingConfig
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    count: int
    also_read_as: tuple[str, ...] = ()


def runs(recipe: RetrievalRecipe, records: Records) -> list[Run]:
    """For every variant that trains one choosing run a rate with the first seed, then its seeds at the best rate."""

    def configure(name: str, rate: float, seed: int) -> RetrievalRun:
        decoder = recipe.trained[name]
        training = recipe.training.at(rate, seed=seed, prior_rate_factor=decoder.kind.prior_rate_factor)
        also = tuple(other.attention for other in recipe.variants if other.kind.trained_as == name)
        return taken_from(recipe, RetrievalRun, decoder=decoder, training=training, also_read_as=also)

    seeds = {name: recipe.seeds if name in recipe.repeated else recipe.seeds[:1] for name in recipe.trained}
    return swept_runs(recipe, records, seeds, configure, choose, measure)


FIGURE = Figure("fig3_retrieval", recipe, runs)


def _train(run: RetrievalRun, checkpoint: Path) -> tuple[Decoder, TrainingResult]:
    network = Decoder(run.decoder)
    label = f"{run.decoder.attention}, rate {run.training.learning_rate:g}, seed {run.seed}"
    return network, train(network, run.task, run.training, label=label, checkpoint=checkpoint)


def choose(run: RetrievalRun, checkpoint: Path) -> Measurement:
    """Train a decoder on both tasks; its training loss judges its rate."""
    _, training = _train(run, checkpoint)
    return Measurement(training_rows(training), summary=f"training loss {training.rows[-1]['loss']:.4f}")


def measure(run: RetrievalRun, checkpoint: Path) -> Measurement:
    """Train a decoder on both tasks and examine it at every length and depth, also as what else reads its weights."""
    network, training = _train(run, checkpoint)
    rows: list[Row] = []
    with autocast(run.training, network.embedding.weight.device):
        for variant in (run.decoder.attention, *run.also_read_as):
            reader = network.read_as(variant)
            found = examine(reader, run.task.haystacks, lengths=run.lengths, depths=run.depths, count=run.count)
            rows += [{"variant": variant} | row for row in found]
    near, far = (_mean_score(rows, run.decoder.attention, length) for length in (run.lengths[0], run.lengths[-1]))
    rows += training_rows(training)
    rows.append({"quantity": "training_seconds", "unit": "seconds", "value": training.wall_seconds})
    if run.seed == 0 and run.decoder.attention == "goat":
        rows += _prior_rows(network, 2 * run.decoder.train_length)
    summary = f"accuracy {near:.3f} at {run.lengths[0]} tokens, {far:.3f} at {run.lengths[-1]}"
    return Measurement([{"variant": run.decoder.attention} | row for row in rows], summary)


@torch.no_grad()
def _prior_rows(network: Decoder, length: int) -> list[Row]:
    """Log-prior of the last of ``length`` queries by lag, with maximum zero, of every block and head."""
    device = network.embedding.weight.device
    query, keys = torch.tensor([length - 1], device=device), torch.arange(length - 1, -1, -1, device=device)
    rows: list[Row] = []
    for b, block in enumerate(network.blocks):
        prior = block.attention.prior
        assert prior is not None
        log_prior = prior.dense(query, keys)[:, 0].float().cpu()
        for h, values in enumerate(log_prior - log_prior.amax(-1, keepdim=True)):
            what: Row = {"panel": "c", "quantity": "log_prior", "unit": "nats", "block": b, "head": h}
            rows += [what | {"lag": lag, "value": float(values[lag])} for lag in shown_lags(length)]
    return rows


def shown_lags(count: int) -> list[int]:
    """Lags that a curve over 0 ... count - 1 is drawn at: all short ones, then about forty an octave."""
    grid = {round(float(lag)) for lag in np.geomspace(1, count - 1, 96)}
    return sorted({*range(min(32, count)), *grid})


def _mean_score(rows: Sequence[Row], variant: str, length: int) -> float:
    """Mean over tasks and depths of what the paper reports."""
    mine = [row for row in rows if (row["variant"], row["length"]) == (variant, length)]
    return float(np.mean([row["value"] for row in mine if row["quantity"] == SCORES[row["task"]]]))


# Table and claims ---------------------------------------------------------------------------------------------------


class RetrievalStudy(SweptStudy):
    """All decoders of figure 3."""

    recipe: RetrievalRecipe
    figure = FIGURE

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the decoders."""
        return tuple(decoder.attention for decoder in self.recipe.variants)

    def trained_as(self, variant: str) -> str:
        """Scaled kinds of RoPE read its weights."""
        return ATTENTION_KINDS[variant].trained_as or variant

    def scores(self, variant: str, task: str) -> NDArray[np.float64]:
        """(S, N, D) what the paper reports of a variant, by seed, length and depth."""
        rows = self.rows(SCORES[task], variant=variant, task=task).sort_values(["seed", "length", "depth"])
        shape = (-1, len(self.recipe.lengths), len(self.recipe.depths))
        return rows.value.to_numpy(dtype=np.float64).reshape(shape)

    def over_seeds(self, variant: str, task: str, length: int, *, less: float = 0.0) -> SeedInterval:
        """Accuracy at a length less a number, mean over depths."""
        at = self.recipe.lengths.index(length)
        return SeedInterval.of((self.scores(variant, task)[:, at].mean(-1) - less).tolist())

    def accuracies(self) -> pandas.DataFrame:
        """Mean over depths and seeds, and the worst depth and seed, by task and variant (rows) and length."""
        found = {
            (task, variant): {
                (what, length): of(self.scores(variant, task)[:, k])
                for what, of in (("mean", np.mean), ("worst seed and depth", np.min))
                for k, length in enumerate(self.recipe.lengths)
            }
            for task in SCORES
            for variant in self.variants
        }
        return pandas.DataFrame(found).T


def verdict(study: RetrievalStudy) -> str:
    """The claims, the numbers and what became of them, in Markdown; intervals are of 95 % over seeds."""
    recipe = study.recipe
    factor = max(factor for factor in recipe.length_factors if factor <= 16)
    at = recipe.length_factors.index(factor)
    lines = [_finds(study, variant, task, at) for variant in ("goat", "paper_goat") for task in SCORES]
    lines += [_against(study, variant, "alibi") for variant in ("goat", "paper_goat")]
    for variant in [name for name in study.variants if name not in ("goat", "paper_goat", "alibi")]:
        near, far = ([study.scores(variant, task)[:, k].mean() for task in SCORES] for k in (0, at))
        lines.append(
            f"- {variant}: passkey {near[0]:.3f}, needle {near[1]:.3f} at the training length; "
            f"{far[0]:.3f} and {far[1]:.3f} at {factor}x."
        )
    count = len(recipe.seeds)
    seeds = f"{count} seed{'s' if count > 1 else ''}"
    lines.append(f"- {seeds} at scale `{recipe.scale}`; {study.origin()}; {study.rates()}.")
    return "\n".join(lines)


def _finds(study: RetrievalStudy, variant: str, task: str, at: int) -> str:
    scores, length = study.scores(variant, task)[:, at], study.recipe.lengths[at]
    return claim(
        f"{display_name(variant)}, {task}, {study.recipe.length_factors[at]}x: at least {NEAR_PERFECT}",
        study.over_seeds(variant, task, length, less=NEAR_PERFECT),
        f"{SCORES[task].replace('_', ' ')}: mean {scores.mean():.3f}, worst seed and depth {scores.min():.3f}.",
    )


def _against(study: RetrievalStudy, variant: str, other: str) -> str:
    """Whether a variant is nowhere below another: at the task and length with the smallest difference."""
    gaps = {}
    for task in SCORES:
        ours, theirs = (study.scores(name, task).mean(-1) for name in (variant, other))
        for k, length in enumerate(study.recipe.lengths):
            gaps[task, length] = (ours - theirs)[:, k]
    (task, length), gap = min(gaps.items(), key=lambda item: float(item[1].mean()))
    return claim(
        f"{display_name(variant)} nowhere more than {TOLERATED} below {display_name(other)}",
        SeedInterval.of((gap + TOLERATED).tolist()),
        f"Smallest difference, paired by seed: {SeedInterval.of(gap.tolist()):+.3f} ({task}, {length} tokens).",
    )


# Picture ------------------------------------------------------------------------------------------------------------


def draw(study: RetrievalStudy) -> Picture:
    """(a, b) accuracy against length, (c) the learned log-prior; below, accuracy by length and depth.

    Points are means over depths and seeds, bars reach from the lowest to the highest seed.
    """
    recipe, columns = study.recipe, len(study.variants)
    curves = [["passkey"] * (columns // 3) + ["needle"] * (columns // 3) + ["prior"] * (columns - 2 * (columns // 3))]
    maps = [[f"{task} {variant}" for variant in study.variants] for task in SCORES]
    figure, axes = mosaic(curves + maps, size=(16.5, 8.6), heights=(1.55, 1, 1))
    for task, quantity in SCORES.items():
        _draw_curves(study, task, axes[task])
        axes[task].set_ylabel(f"{task}: {quantity.replace('_', ' ')}")
        axes[task].legend().remove()  # one above all panels covers no curve
        for variant in study.variants:
            panel, grid = axes[f"{task} {variant}"], study.scores(variant, task).mean(0)
            sizes: dict[str, Any] = {"lengths": recipe.lengths, "depths": recipe.depths}
            plot_depth_grid(grid, **sizes, train_length=recipe.task.length, axes=panel)
            panel.set_title(f"{display_name(variant)}: {task}", fontsize=8.5)
        axes[f"{task} {study.variants[0]}"].set_ylabel("depth", fontsize=9)
    handles, labels = axes["passkey"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    _draw_prior(study, axes["prior"])
    for name in maps[1]:
        axes[name].set_xlabel("context (tokens)", fontsize=8)
    titles = ("passkey retrieval", "needle retrieval", "GOAT's learned log-prior of the last query, all heads")
    title_panels((axes["passkey"], axes["needle"], axes["prior"]), titles)
    return figure


def _draw_curves(study: RetrievalStudy, task: str, axes: Axes) -> None:
    curves, errors = {}, {}
    for variant in study.variants:
        seeds = study.scores(variant, task).mean(-1)
        mean = seeds.mean(0).clip(seeds.min(0), seeds.max(0))  # which rounding may leave
        curves[display_name(variant)] = mean
        errors[display_name(variant)] = [mean - seeds.min(0), seeds.max(0) - mean]
    plot_length_curves(study.recipe.lengths, curves, train_length=study.recipe.task.length, errors=errors, axes=axes)
    axes.set_ylim(-0.04, 1.14)  # room for the mark of the training length above accuracy one


def _draw_prior(study: RetrievalStudy, axes: Axes) -> None:
    rows = study.rows("log_prior", seed=study.recipe.seeds[0])
    by_head = rows.pivot_table(index=["block", "head"], columns="lag", values="value")
    train_length = study.recipe.task.length
    plot_log_prior_by_lag(by_head.to_numpy(), lags=by_head.columns.to_numpy(), train_length=train_length, axes=axes)
