"""Figure 1: does a neutral prior learn where a copy mixture copies from? From recipe to picture.

Legend: H heads, L tokens, i query, j key, t lag.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.diagnostics.gauge import centre_rows
from eotattn.experiments.evaluation import watch_sinks
from eotattn.experiments.intervals import SeedInterval, claim
from eotattn.experiments.networks import CopyReader, CopyReaderConfig
from eotattn.experiments.prior_parts import PriorParts, split_prior
from eotattn.experiments.records import Measurement, Records, Row, Run, TrainedRun, taken_from
from eotattn.experiments.scales import check_scale
from eotattn.experiments.study import Figure, Study
from eotattn.experiments.tasks import CopyMixture
from eotattn.experiments.training import Evaluate, TrainingConfig, train, training_rows
from eotattn.plotting import (
    OKABE_ITO,
    panels,
    plot_causal_prior,
    plot_key_only,
    plot_relative,
    plot_row_centred,
    title_panels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

__all__ = ["FIGURE", "CopyMixtureStudy", "correlation", "draw", "measure", "measure_head", "recipe", "runs", "verdict"]

#: Correlation with the ideal log-prior that is asked for.
BOUND = 0.95

# Recipe -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CopyMixtureRecipe:
    """The reader, its data and its training; the final loss is measured on ``test_sequences`` fresh sequences."""

    scale: str
    task: CopyMixture
    network: CopyReaderConfig
    training: TrainingConfig
    seeds: tuple[int, ...]
    test_sequences: int


def recipe(scale: str = "laptop") -> CopyMixtureRecipe:
    """Figure 1 at a scale. The paper gives no sizes for it, so ``"paper"`` and ``"h200"`` are the same longer run.

    The planted relative part is a spike, whose spectrum is flat. Keys without use get hardly any gradient, so what the
    learned part looks like there is left to the waves: short periods, close enough together that they do not align
    again within the window, leave it flat. Periods up to the window's length would give a broad bump that predicts as
    well. For the same reason the warm-up is long and the content learns fast: a prior that moves before tokens can be
    read follows noise, and a key that noise has pushed away comes back slowly.

    Example:
        >>> recipe("laptop").task.length
        32
    """
    check_scale("copy_mixture", scale)
    length = 16 if scale == "smoke" else 32
    steps = {"smoke": 60, "laptop": 800}.get(scale, 3000)
    task = CopyMixture(vocabulary_size=16, length=length, first_probability=0.4, previous_probability=0.4)
    network = CopyReaderConfig(
        vocabulary_size=task.vocabulary_size,
        embed_dim=32,
        num_heads=1,
        num_frequencies=length,
        min_period=2.05,
        max_period=8.0,
        length_scale=float(length),
    )
    training = TrainingConfig(
        steps=steps,
        batch_size=64 if scale in ("smoke", "laptop") else 512,
        learning_rate=1e-2,
        prior_learning_rate=3e-2,
        warmup_steps=steps // 4,
        weight_decay=0.0,
        log_every=max(1, steps // 20),
        evaluate_every=max(1, steps // 20),
    )
    return CopyMixtureRecipe(scale, task, network, training, (0, 1, 2), 64 if scale == "smoke" else 4096)


# Runs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReaderRun(TrainedRun):
    """One reader, trained and read; fields as in :class:`CopyMixtureRecipe`."""

    task: CopyMixture
    network: CopyReaderConfig
    training: TrainingConfig
    test_sequences: int


def runs(recipe: CopyMixtureRecipe, records: Records) -> list[Run]:
    """One run a seed."""
    readers = [taken_from(recipe, ReaderRun, training=replace(recipe.training, seed=seed)) for seed in recipe.seeds]
    return [Run(f"goat-seed{reader.seed}", reader, measure) for reader in readers]


FIGURE = Figure("fig1_copy_mixture", recipe, runs)


def measure(run: ReaderRun, checkpoint: Path) -> Measurement:
    """Train a reader on the copy mixture and read its log-prior."""
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
    rows = _prior_rows(split_prior(network.prior, run.task.length).without_key_slope(), run.task.ideal_log_prior())
    rows.append({"panel": "finding", "quantity": "loss", "unit": "nats per token", "value": loss})
    rows.append({"panel": "finding", "quantity": "best_loss", "unit": "nats per token", "value": best})
    rows += training_rows(training)
    for row in training.evaluations:
        mass = sum(sum(heads) for heads in row["sink_mass"]) / run.network.num_heads
        place = {"panel": "e", "step": row["step"]}
        rows.append(place | {"quantity": "mass_on_first_token", "unit": "probability", "value": mass})
        rows.append(place | {"quantity": "correlation", "unit": "dimensionless", "value": row["correlation"]})
    return Measurement([{"variant": "goat"} | row for row in rows], summary=f"loss {loss:.4f}, at best {best:.4f}")


def _watch(network: CopyReader, run: ReaderRun) -> Evaluate:
    """An evaluation hook: the mass on the first token, and how close the log-prior is to the ideal one."""
    tokens = run.task.batch(16, seed=run.seed, step=run.training.steps).inputs
    sinks, ideal = watch_sinks(network, tokens), run.task.ideal_log_prior()

    def watch(bare: nn.Module, step: int) -> list[Row]:
        total = split_prior(network.prior, run.task.length).total
        found = [correlation(head, ideal) for head in total]
        return [row | {"correlation": sum(found) / len(found)} for row in sinks(bare, step)]

    return watch


def _prior_rows(parts: PriorParts, ideal: Tensor) -> list[Row]:
    """Panels (a) to (d) of every head, and its findings; lags count from the predicted token, so 1 is its neighbour."""
    rows: list[Row] = []
    lower = torch.ones_like(ideal, dtype=torch.bool).tril().nonzero().tolist()
    for h, total in enumerate(parts.total):
        centred, induced = centre_rows(total), total.softmax(-1)
        curves = {"key_only_log_prior": (parts.key_only[h], "a", "key", 0)}
        curves["relative_log_prior"] = (parts.relative[h], "b", "lag", 1)
        for quantity, (values, panel, place, first) in curves.items():
            what = {"panel": panel, "quantity": quantity, "unit": "nats", "head": h}
            rows += [what | {place: first + k, "value": float(value)} for k, value in enumerate(values)]
        maps = {"row_centred_log_prior": (centred, "c", "nats"), "induced_prior": (induced, "d", "probability")}
        for quantity, (values, panel, unit) in maps.items():
            what = {"panel": panel, "quantity": quantity, "unit": unit, "head": h}
            rows += [what | {"query": i, "key": j, "value": float(values[i, j])} for i, j in lower]
        found = measure_head(parts, ideal, h)
        rows += [
            {"panel": "finding", "quantity": name, "unit": UNITS[name], "head": h, "value": value}
            for name, value in found.items()
        ]
    return rows


#: What one head's log-prior shows, in the gauge without key slope, with units.
UNITS = {
    "top_key": "tokens",  # where the key-only part is highest
    "key_gap": "nats",  # above the second highest
    "top_lag": "tokens",  # where the relative part is highest
    "lag_gap": "nats",
    "deepest_trough": "nats",  # of the row-centred log-prior
    "negative_share": "fraction",  # of the pairs that the task never copies from, where that is negative
    "correlation": "dimensionless",  # with the ideal log-prior
    "copied_mass": "probability",  # of the induced prior on the two source keys; the ideal is one
    "total_variation": "probability",  # mean distance of its rows to the ideal attention
    "uniform_total_variation": "probability",  # the same for the uniform causal prior
}


def measure_head(parts: PriorParts, ideal: Tensor, head: int) -> dict[str, float]:
    """Compare one head's log-prior with the (L, L) ideal one; the names are those of :data:`UNITS`."""
    total = parts.total[head]
    length = total.shape[-1]
    admissible = torch.ones(length, length, dtype=torch.bool).tril()
    unused = admissible & ~torch.eye(length, dtype=torch.bool)
    unused[:, 0] = False
    centred = centre_rows(total)
    induced, target = total.softmax(-1), ideal.softmax(-1)
    uniform = admissible / admissible.sum(-1, keepdim=True)
    top_keys, top_lags = parts.key_only[head].topk(2), parts.relative[head].topk(2)
    return {
        "top_key": float(top_keys.indices[0]),
        "key_gap": float(top_keys.values[0] - top_keys.values[1]),
        "top_lag": float(top_lags.indices[0]) + 1,
        "lag_gap": float(top_lags.values[0] - top_lags.values[1]),
        "deepest_trough": float(centred[admissible].min()),
        "negative_share": float((centred[unused] < 0).double().mean()),
        "correlation": correlation(total, ideal),
        "copied_mass": float(induced.masked_fill(unused, 0.0).sum(-1).mean()),
        "total_variation": float((induced - target).abs().sum(-1).mean() / 2),
        "uniform_total_variation": float((uniform - target).abs().sum(-1).mean() / 2),
    }


def correlation(log_prior: Tensor, ideal: Tensor) -> float:
    """Pearson correlation of two (L, L) causal log-priors over admissible pairs, row-centred; NaN if one is flat."""
    admissible = torch.ones_like(ideal, dtype=torch.bool).tril()
    pair = torch.stack([centre_rows(log_prior)[admissible], centre_rows(ideal)[admissible]])
    return float(torch.corrcoef(pair)[0, 1]) if bool(pair.std(-1).min() > 0) else math.nan


# Table and claims ---------------------------------------------------------------------------------------------------


class CopyMixtureStudy(Study):
    """The readers' log-priors."""

    figure = FIGURE

    def findings(self) -> Any:
        """A row a seed and head, a column a finding."""
        found = self.table[(self.table.panel == "finding") & self.table["head"].notna()]
        return found.pivot_table(index=["seed", "head"], columns="quantity", values="value")[list(UNITS)]

    def losses(self) -> Any:
        """Training loss by step (rows) and seed (columns)."""
        return self.rows("training_loss").pivot_table(index="step", columns="seed", values="value")


def verdict(study: CopyMixtureStudy) -> str:
    """The claims, the numbers and what became of them, in Markdown; intervals are of 95 % over seeds."""
    heads = study.findings().reset_index()
    heads["first"] = heads.key_gap * np.where(heads.top_key == 0, 1.0, -1.0)
    heads["neighbour"] = heads.lag_gap * np.where(heads.top_lag == 1, 1.0, -1.0)
    margins = {
        "the key-only part is highest at the first token": heads["first"],
        "the relative part is highest at lag one": heads.neighbour,
        "there are troughs elsewhere": -heads.deepest_trough,
    }
    lines = []
    for text, values in margins.items():
        over_seeds = _over_seeds(values, heads)
        lines.append(claim(f"The planted structure is recovered: {text}", over_seeds, f"By {over_seeds:.2f} nats."))
    close, above = _over_seeds(heads.correlation, heads), _over_seeds(heads.correlation - BOUND, heads)
    numbers = f"{close:.4f} over seeds; the lowest is {heads.correlation.min():.4f}."
    lines.append(claim(f"Correlation with the ideal log-prior above {BOUND}, row-centred", above, numbers))
    lines += [_describe(head) for head in heads.itertuples()]
    losses, best = study.of_seeds("loss"), study.of_seeds("best_loss")
    for seed, loss in losses.items():
        above_best = f"{loss - best[seed]:.4f} above the generator's own {best[seed]:.4f}"
        lines.append(f"- Seed {seed}: loss on fresh sequences {loss:.4f} nats a token, {above_best}.")
    return "\n".join([*lines, f"- {study.origin()}."])


def _over_seeds(values: Any, heads: Any) -> SeedInterval:
    return SeedInterval.of(values.groupby(heads.seed).mean().tolist())


def _describe(head: Any) -> str:
    return (
        f"- Seed {head.seed}, head {head.head:.0f}: the key-only part is highest at position {head.top_key:.0f} "
        f"({head.key_gap:.2f} nats above the next), the relative part at lag {head.top_lag:.0f} ({head.lag_gap:.2f} "
        f"nats above the next). The deepest trough of the row-centred sum is {head.deepest_trough:.2f} nats, and "
        f"{head.negative_share:.0%} of the pairs that are never copied are negative. Correlation with the ideal "
        f"log-prior: {head.correlation:.4f}. The induced prior puts {head.copied_mass:.0%} of its mass on the two "
        f"sources; its total-variation distance to the ideal attention is {head.total_variation:.3f} (uniform prior: "
        f"{head.uniform_total_variation:.3f})."
    )


# Picture ------------------------------------------------------------------------------------------------------------


def draw(study: CopyMixtureStudy, *, seed: int = 0, head: int = 0) -> Picture:
    """(a) to (d) show one head as the paper does, (e) and (f) how all seeds got there.

    (a) key-only part, (b) relative part, (c) row-centred sum, (d) induced causal prior.
    """
    figure, grid = panels(2, 3, size=(13.8, 7.4))
    (key_only, relative, formation), (centred, induced, loss) = grid
    where = {"seed": seed, "head": head}
    u = study.rows("key_only_log_prior", **where).sort_values("key").value.to_numpy()
    kappa = study.rows("relative_log_prior", **where).sort_values("lag")
    plot_key_only(u[None], axes=key_only)
    plot_relative(kappa.value.to_numpy()[None], lags=kappa.lag.to_numpy(), axes=relative)
    relative.set_xlabel("lag to the predicted token, i + 1 − j (tokens)")
    _mark(key_only, 0, u[0], "first token")
    _mark(relative, 1, kappa.value.iloc[0], "lag one")
    plot_row_centred(_map(study, "row_centred_log_prior", where, np.nan), axes=centred)
    plot_causal_prior(_map(study, "induced_prior", where, 0.0), axes=induced)
    _draw_formation(study, formation)
    _draw_loss(study, loss)
    titles = ("key-only part", "relative part", "row-centred log-prior", "induced causal prior", "formation", "loss")
    title_panels([key_only, relative, centred, induced, formation, loss], titles)
    return figure


def _map(study: CopyMixtureStudy, quantity: str, where: Mapping[str, int], above: float) -> np.ndarray:
    """(L, L), query by key."""
    found = study.grid(quantity, "query", "key", **where)
    return np.where(np.tri(len(found), dtype=bool), found, above)


def _draw_formation(study: CopyMixtureStudy, axes: Axes) -> None:
    """Mass on the first token, and closeness to the ideal log-prior, against training steps; one line a seed."""
    colours = {"mass_on_first_token": OKABE_ITO["blue"], "correlation": OKABE_ITO["vermillion"]}
    labels = {"mass_on_first_token": "mass on the first token", "correlation": "correlation with the ideal log-prior"}
    for quantity, colour in colours.items():
        for k, (_, rows) in enumerate(study.rows(quantity, panel="e").groupby("seed")):
            axes.plot(rows.step, rows.value, color=colour, linewidth=1.3, label=None if k else labels[quantity])
    ideal = float(study.recipe.task.ideal_attention()[:, 0].mean())
    axes.axhline(ideal, color=colours["mass_on_first_token"], linestyle=":", label="mass under the ideal attention")
    axes.axhline(BOUND, color=colours["correlation"], linestyle=":", label=f"bound, {BOUND}")
    axes.set_xlabel("training step")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_loss(study: CopyMixtureStudy, axes: Axes) -> None:
    """Training loss, one line a seed, beside what the generator itself would reach on fresh sequences."""
    for k, (_, rows) in enumerate(study.rows("training_loss").groupby("seed")):
        label = None if k else "training loss"
        axes.plot(rows.step, rows.value, color=OKABE_ITO["blue"], linewidth=1.3, label=label)
    best = study.rows("best_loss").value.mean()
    axes.axhline(float(best), color="0.35", linestyle=":", label="the generator itself")
    axes.set_xlabel("training step")
    axes.set_ylabel("nats a token")
    axes.legend(frameon=False, fontsize=8)


def _mark(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(14, -4), textcoords="offset points", fontsize=9, va="center")
