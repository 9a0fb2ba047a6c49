"""Figure 5: whose accuracy holds when a vision transformer sees more patches than in training? From recipe to picture.

Legend: S seeds, A blocks but the last, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas
import torch
from numpy.typing import NDArray
from torch.nn import functional

from eotattn.experiments.grid_prior_parts import describe_grid_log_prior, grid_log_prior
from eotattn.experiments.intervals import SeedInterval, claim
from eotattn.experiments.networks import VisionConfig, VisionTransformer
from eotattn.experiments.networks.vision import POSITION_UNITS
from eotattn.experiments.rate_sweep import SweptStudy, swept_runs
from eotattn.experiments.records import Measurement, Records, Row, Run, TrainedRun, taken_from
from eotattn.experiments.scales import check_scale
from eotattn.experiments.study import Figure, paired
from eotattn.experiments.tasks import ImageTask, open_images
from eotattn.experiments.tasks.images import DIGITS
from eotattn.experiments.training import TrainingConfig, TrainingResult, train, training_rows
from eotattn.plotting import line_styles, mosaic, title_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

__all__ = ["FIGURE", "VisionRecipe", "VisionStudy", "draw", "evaluate_images", "measure", "recipe", "runs", "verdict"]

#: Loss of accuracy from the training resolution that still counts as holding.
TOLERATED = 0.05
#: Ratio of distances below which a head counts as local, and share of its variance that counts as shift invariance.
LOCAL, INVARIANT = 0.9, 0.9
#: Images of a forward pass at the training resolution; fewer at higher ones.
EVALUATION_BATCH = 256
#: Names in legends.
NAMES = {"goat": "GOAT", "learned": "learned absolute", "sinusoidal": "2-D sinusoidal", "none": "no positions"}

# Recipe -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionRecipe:
    """Figure 5.

    Args:
        scale: Name of the scale.
        corpus: As in :func:`eotattn.experiments.tasks.open_images`.
        sizes: Rows and columns of the images, pixels: of training, then those that are evaluated as well.
        max_shift: Pixels by which training images are shifted at random.
        variants: One transformer a curve; equal but for the positions.
        training: The run, once a variant, seed and learning rate.
        prior_rate_factor: Learning rate of log-priors over that of the rest.
        learning_rates: Rates that all seeds train every variant at; the one with the least mean loss on validation
            images counts.
        seeds: Seeds of weights and batches.
    """

    scale: str
    corpus: str
    sizes: tuple[int, ...]
    max_shift: int
    variants: tuple[VisionConfig, ...]
    training: TrainingConfig
    prior_rate_factor: float
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]

    @property
    def sweep_seeds(self) -> tuple[int, ...]:
        """All seeds try the rates: a tenth of the digits are 179 images, too few for one seed to choose by."""
        return self.seeds


def _transformers(train_size: int, patch_size: int, sizes: Mapping[str, int]) -> tuple[VisionConfig, ...]:
    """Equal transformers with the three kinds of positions; waves from 2.5 patches to four times the image."""
    grid = train_size // patch_size
    return tuple(
        VisionConfig(
            name,
            patch_size=patch_size,
            train_grid=grid,
            num_frequencies=16,
            num_key_frequencies=2,
            min_period=2.5,
            max_period=4.0 * grid,
            **sizes,  # type: ignore[arg-type]
        )
        for name in ("goat", "learned", "sinusoidal")
    )


RECIPES = {
    "smoke": VisionRecipe(
        scale="smoke",
        corpus=DIGITS,
        sizes=(8, 16, 24),
        max_shift=1,
        variants=_transformers(8, 2, {"num_classes": 10, "num_layers": 2, "embed_dim": 16, "num_heads": 2}),
        training=TrainingConfig(steps=4, batch_size=8, warmup_steps=1, log_every=2),
        prior_rate_factor=10.0,
        learning_rates=(1e-3, 3e-3),
        seeds=(0, 1),
    ),
    "laptop": VisionRecipe(
        scale="laptop",
        corpus=DIGITS,
        sizes=(8, 16, 24),
        max_shift=1,
        variants=_transformers(8, 2, {"num_classes": 10, "num_layers": 3, "embed_dim": 48, "num_heads": 4}),
        training=TrainingConfig(steps=600, batch_size=32, warmup_steps=50, log_every=20, checkpoint_every=300),
        prior_rate_factor=10.0,
        learning_rates=(1e-3, 3e-3, 1e-2),
        seeds=(0, 1, 2),
    ),
    "h200": VisionRecipe(
        scale="h200",
        corpus=DIGITS,
        sizes=(16, 32, 48),
        max_shift=2,
        variants=_transformers(16, 2, {"num_classes": 10, "num_layers": 3, "embed_dim": 96, "num_heads": 4}),
        training=TrainingConfig(steps=800, batch_size=128, warmup_steps=80, log_every=40),
        prior_rate_factor=10.0,
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 2e-2),
        seeds=(0, 1, 2),
    ),
    "paper": VisionRecipe(
        scale="paper",
        corpus="imagenet",
        sizes=(224, 384, 512),
        max_shift=16,
        variants=_transformers(
            224, 16, {"num_classes": 1000, "channels": 3, "num_layers": 12, "embed_dim": 384, "num_heads": 6}
        ),
        training=TrainingConfig(
            steps=112_000,  # 90 epochs
            batch_size=1024,
            warmup_steps=5000,
            compile=True,
            precision="bf16",
            log_every=50,
            checkpoint_every=1000,
        ),
        prior_rate_factor=10.0,
        learning_rates=(2.5e-4, 5e-4, 1e-3),
        seeds=(0, 1, 2),
    ),
}


def recipe(scale: str = "laptop") -> VisionRecipe:
    """Figure 5 at a scale: handwritten digits of 8 x 8 pixels, at ``"h200"`` interpolated to 16 for a finer grid.

    ``"paper"`` has the paper's resolutions and frequencies on a folder ``imagenet`` of one folder a class, which the
    user provides; the paper does not say how long it trains.

    Example:
        >>> recipe("laptop").sizes
        (8, 16, 24)
    """
    return RECIPES[check_scale("vision", scale)]


# Runs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionRun(TrainedRun):
    """One transformer, trained and measured; fields as in :class:`VisionRecipe`."""

    corpus: str
    max_shift: int
    network: VisionConfig
    training: TrainingConfig
    sizes: tuple[int, ...]


def runs(recipe: VisionRecipe, records: Records) -> list[Run]:
    """A choosing run a seed, variant and rate; then every variant at its rate."""
    networks = {network.positions: network for network in recipe.variants}

    def configure(name: str, rate: float, seed: int) -> VisionRun:
        training = recipe.training.at(rate, seed=seed, prior_rate_factor=recipe.prior_rate_factor)
        return taken_from(recipe, VisionRun, network=networks[name], training=training)

    return swept_runs(recipe, records, dict.fromkeys(networks, recipe.seeds), configure, choose, measure)


FIGURE = Figure("fig5_vision", recipe, runs)


def units_of(variant: str, size: int, train_size: int) -> tuple[str, ...]:
    """Units of positions that make a difference: both for fixed waves beyond the training resolution."""
    has_units = variant in ("goat", "sinusoidal") and size != train_size
    return POSITION_UNITS if has_units else POSITION_UNITS[-1:]


def _train(run: VisionRun, checkpoint: Path) -> tuple[VisionTransformer, ImageTask, TrainingResult]:
    task = ImageTask(open_images(run.corpus), size=run.sizes[0], max_shift=run.max_shift)
    network = VisionTransformer(run.network)
    label = f"{run.network.positions}, seed {run.seed}"
    return network, task, train(network, task, run.training, label=label, checkpoint=checkpoint)


def choose(run: VisionRun, checkpoint: Path) -> Measurement:
    """Train a transformer; its loss on validation images judges its rate."""
    network, task, training = _train(run, checkpoint)
    size, positions = run.sizes[0], run.network.positions
    _, loss = evaluate_images(network, task, size, units_of(positions, size, size)[0], part="validation")
    rows = [*training_rows(training), loss | {"panel": "training", "quantity": "choice_loss"}]
    rows = [{"variant": positions} | row for row in rows]
    return Measurement(rows, summary=f"validation loss {loss['value']:.4f}", data=task.fingerprint)


def measure(run: VisionRun, checkpoint: Path) -> Measurement:
    """Train a transformer, classify the held-out images at every resolution, and read its log-prior."""
    network, task, training = _train(run, checkpoint)
    variant, rows = run.network.positions, training_rows(training)
    for size in run.sizes:
        for unit in units_of(variant, size, run.sizes[0]):
            rows += evaluate_images(network, task, size, unit)
    accuracies = [f"{r['value']:.3f} at {r['size']} ({r['positions']})" for r in rows if r["quantity"] == "accuracy"]
    count, seconds = sum(p.numel() for p in network.parameters()), training.wall_seconds
    rows.append({"panel": "training", "quantity": "parameters", "unit": "count", "value": count})
    rows.append({"panel": "training", "quantity": "training_seconds", "unit": "seconds", "value": seconds})
    rows = [{"variant": variant} | row for row in rows + _prior_rows(network)]
    return Measurement(rows, summary="accuracy " + ", ".join(accuracies), data=task.fingerprint)


@torch.no_grad()
def evaluate_images(
    network: VisionTransformer, task: ImageTask, size: int, unit: str, *, part: str = "held_out"
) -> list[Row]:
    """Accuracy and loss on all images of a part at a resolution, pixels; ``unit`` is what positions are counted in."""
    device = next(network.parameters()).device
    batch_size = max(1, EVALUATION_BATCH * task.size**2 // size**2)
    right, loss, count = 0, 0.0, 0
    for batch in task.batches_of(part, size, batch_size):
        logits, labels = network(batch.inputs.to(device), unit=unit).float(), batch.targets.to(device)
        right += int((logits.argmax(-1) == labels).sum())
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    place: Row = {"panel": "a", "size": size, "positions": unit}
    return [
        place | {"quantity": "accuracy", "unit": "fraction", "value": right / count},
        place | {"quantity": "loss", "unit": "nats per image", "value": loss / count},
    ]


def _prior_rows(network: VisionTransformer) -> list[Row]:
    """What the learned log-prior of every block but the last looks like; nothing for other positions.

    Of the last block only the class token is read out, which lies nowhere: its log-prior on the grid is never used.
    """
    grid = network.config.train_grid
    units = {"strength": "nats", "shift_invariance": "fraction", "distance_ratio": "dimensionless"}
    rows: list[Row] = []
    for b, prior in enumerate(network.priors[:-1]):
        parts = describe_grid_log_prior(grid_log_prior(prior.parts[0], grid), grid)
        for name, unit in units.items():
            what: Row = {"panel": "c", "quantity": name, "unit": unit, "block": b}
            rows += [what | {"head": h, "value": float(value)} for h, value in enumerate(getattr(parts, name))]
        for (h, i, j), value in np.ndenumerate(parts.lag_map.numpy()):
            what = {"panel": "b", "quantity": "log_prior_by_lag", "unit": "nats", "block": b, "head": h}
            rows.append(what | {"row_lag": i - grid + 1, "column_lag": j - grid + 1, "value": float(value)})
    return rows


# Table and claims ---------------------------------------------------------------------------------------------------


class VisionStudy(SweptStudy):
    """All transformers of figure 5."""

    recipe: VisionRecipe
    figure = FIGURE

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the transformers' positions."""
        return tuple(network.positions for network in self.recipe.variants)

    def accuracies(self, variant: str, size: int, unit: str) -> dict[int, float]:
        """Seed -> held-out accuracy; where the unit of positions makes no difference, of either."""
        known = units_of(variant, size, self.recipe.sizes[0])
        return self.of_seeds("accuracy", variant=variant, size=size, positions=unit if unit in known else known[0])

    def accuracy(self, variant: str, size: int, unit: str = "image") -> SeedInterval:
        """The same over seeds."""
        return SeedInterval.of(list(self.accuracies(variant, size, unit).values()))

    def prior(self, name: str) -> NDArray[np.float64]:
        """(S, A, H) a number of the learned log-priors."""
        rows = self.rows(name, variant="goat").sort_values(["seed", "block", "head"])
        shape = (rows.seed.nunique(), rows.block.nunique(), rows["head"].nunique())
        return rows.value.to_numpy(dtype=np.float64).reshape(shape)

    def lag_maps(self) -> NDArray[np.float64]:
        """(S, A, H, 2 G - 1, 2 G - 1) mean log-prior by row and column lag."""
        places = ["seed", "block", "head", "row_lag", "column_lag"]
        rows = self.rows("log_prior_by_lag", variant="goat").sort_values(places)
        return rows.value.to_numpy(dtype=np.float64).reshape([rows[place].nunique() for place in places])

    def table_of_accuracies(self) -> pandas.DataFrame:
        """Accuracy by variant and unit (rows) and resolution (columns)."""
        found = {
            (variant, unit): {size: f"{self.accuracy(variant, size, unit):.3f}" for size in self.recipe.sizes}
            for variant in self.variants
            for unit in units_of(variant, self.recipe.sizes[-1], self.recipe.sizes[0])
        }
        return pandas.DataFrame(found).T

    def table_of_priors(self) -> pandas.DataFrame:
        """Numbers of the learned log-priors by block, means over seeds and heads."""
        names = ("strength", "shift_invariance", "distance_ratio")
        return pandas.DataFrame({name: np.nanmean(self.prior(name), axis=(0, 2)) for name in names})


def verdict(study: VisionStudy) -> str:
    """The claims, the numbers and what became of them, in Markdown; intervals are of 95 % over seeds."""
    base, recipe = study.recipe.sizes[0], study.recipe
    ours, theirs, waves = (study.accuracy(v, base) for v in ("goat", "learned", "sinusoidal"))
    lines = [f"- At {base} pixels: GOAT {ours:.3f}, learned {theirs:.3f}, sinusoidal {waves:.3f}."]
    for unit in ("image", "patch"):
        for size in recipe.sizes[1:]:
            lines += _at_size(study, size, unit)
    lines += _prior_lines(study)
    lines.append(
        f"- {len(recipe.seeds)} seeds at scale `{recipe.scale}`; {study.origin()}; {study.rates()}. The held-out "
        f"images are the same for all."
    )
    return "\n".join(lines)


def _at_size(study: VisionStudy, size: int, unit: str) -> list[str]:
    base = study.recipe.sizes[0]
    units = "the training image" if unit == "image" else "patches"
    ours, theirs, waves = (study.accuracy(v, size, unit) for v in ("goat", "learned", "sinusoidal"))
    gain = paired(study.accuracies("goat", size, unit), study.accuracies("learned", size, unit))
    loss = paired(study.accuracies("goat", base, unit), study.accuracies("goat", size, unit))
    where = f"{size} pixels ({size / base:.2g}x), positions in units of {units}"
    numbers = f"GOAT {ours:.3f}, learned (interpolated) {theirs:.3f}, sinusoidal {waves:.3f}"
    kept = SeedInterval(TOLERATED - loss.mean, loss.half_width, loss.count)
    return [
        claim(
            f"{where}: better than learned absolute embeddings",
            gain,
            f"{numbers}; difference to learned {gain:+.3f}, paired by seed.",
        ),
        claim(
            f"{where}: accuracy holds, to {TOLERATED}",
            kept,
            f"GOAT loses {loss:+.3f} from the training resolution.",
        ),
    ]


def _prior_lines(study: VisionStudy) -> list[str]:
    ratio, strength = study.prior("distance_ratio"), study.prior("strength")
    weights = strength**2 + 1e-30
    explained = np.nan_to_num(study.prior("shift_invariance")) * weights
    invariance = SeedInterval.of((explained.sum((1, 2)) / weights.sum((1, 2))).tolist())
    by_seed = SeedInterval.of(ratio.mean((1, 2)).tolist())
    return [
        claim(
            "From a uniform start the prior becomes local",
            SeedInterval(1 - by_seed.mean, by_seed.half_width, by_seed.count),
            f"The mean distance under the induced prior is {by_seed:.3f} of that under the uniform one; "
            f"{float((ratio < LOCAL).mean()):.0%} of the heads are below {LOCAL}. Its standard deviation is "
            f"{strength.mean():.2f} nats on average, {strength.max():.2f} at most; it started at exactly zero.",
        ),
        claim(
            f"It becomes shift invariant, to {INVARIANT:.0%} of its variance",
            SeedInterval(invariance.mean - INVARIANT, invariance.half_width, invariance.count),
            f"The lag alone explains {invariance.mean:.0%}; the rest is the key-only part, which is free to grow.",
        ),
    ]


# Picture ------------------------------------------------------------------------------------------------------------


def draw(study: VisionStudy) -> Picture:
    """(a) accuracy by resolution, (b) mean log-prior by lag, (c) by distance, (d) to (f) single heads."""
    figure, axes = mosaic(["abc", "def"], size=(13.5, 7.6), heights=(1, 1))
    _draw_accuracy(study, axes["a"])
    lag_maps = study.lag_maps()
    _draw_lag_map(lag_maps.mean((0, 1, 2)), axes["b"])
    _draw_profiles(lag_maps, axes["c"])
    titles = ["accuracy by resolution", "learned log-prior, mean", "learned log-prior by distance"]
    strongest = list(np.argsort(-study.prior("strength")[0].flatten()))
    for letter in "def":
        if not strongest:
            axes[letter].set_axis_off()
            continue
        block, head = np.unravel_index(strongest.pop(0), lag_maps.shape[1:3])
        _draw_lag_map(lag_maps[0, block, head], axes[letter])
        titles.append(f"block {block + 1}, head {head + 1}, seed {study.recipe.seeds[0]}")
    title_panels(axes.values(), tuple(titles))
    return figure


def _draw_accuracy(study: VisionStudy, axes: Axes) -> None:
    """Mean and 95 % interval over seeds; dashed where positions are counted in patches."""
    sizes = study.recipe.sizes
    for variant, style in line_styles(list(study.variants)).items():
        for unit, line in (("image", "-"), ("patch", "--")):
            if unit == "patch" and variant == "learned":
                continue
            found = [study.accuracy(variant, size, unit) for size in sizes]
            bars = [0.0 if math.isnan(one.half_width) else one.half_width for one in found]
            name = NAMES[variant] + (", in patches" if unit == "patch" else "")
            means = [one.mean for one in found]
            axes.errorbar(sizes, means, yerr=bars, capsize=3, label=name, **(style | {"linestyle": line}))
    axes.set_xticks(sizes, [f"{size}\n({size / sizes[0]:.2g}x)" for size in sizes])
    axes.set_xlabel("resolution (pixels a side)")
    axes.set_ylabel("held-out accuracy")
    axes.set_ylim(0, 1.03)
    axes.legend(frameon=False, fontsize=8, handlelength=4, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2)


def _draw_lag_map(lag_map: np.ndarray, axes: Axes) -> None:
    """One map of lags, zero in white, the query in the middle."""
    reach = lag_map.shape[-1] // 2
    extreme = max(float(np.abs(lag_map).max()), 1e-9)
    extent = (-reach - 0.5, reach + 0.5, reach + 0.5, -reach - 0.5)
    image = axes.imshow(lag_map, cmap="RdBu_r", vmin=-extreme, vmax=extreme, extent=extent, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="row-centred log-prior (nats)", shrink=0.85)
    axes.plot(0, 0, "+", color="black", markersize=7)
    axes.set_xlabel("column lag (patches)")
    axes.set_ylabel("row lag (patches)")


def _draw_profiles(lag_maps: np.ndarray, axes: Axes) -> None:
    """Log-prior against distance, averaged over directions, heads and seeds; one line a block."""
    reach = lag_maps.shape[-1] // 2
    lags = np.arange(-reach, reach + 1)
    distance = np.round(np.hypot(*np.meshgrid(lags, lags))).astype(int)
    reached = range(reach + 1)
    names = [f"block {b + 1}" for b in range(lag_maps.shape[1])]
    for b, style in enumerate(line_styles(names).values()):
        profiles = np.stack([lag_maps[:, b][..., distance == d].mean((1, 2)) for d in reached], axis=-1)
        axes.plot(list(reached), profiles.mean(0), label=names[b], **style)
        axes.fill_between(list(reached), profiles.min(0), profiles.max(0), color=style["color"], alpha=0.2, linewidth=0)
    axes.axhline(0, color="0.75", linewidth=0.8, zorder=0)
    axes.set_xlabel("distance of query and key (patches)")
    axes.set_ylabel("row-centred log-prior (nats)")
    axes.legend(frameon=False, fontsize=9)
