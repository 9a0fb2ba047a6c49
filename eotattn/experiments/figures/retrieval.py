"""Figure 3 as printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eotattn.experiments.figures.captions import VARIANT_NAMES
from eotattn.experiments.studies.retrieval import SCORES, RetrievalStudy, shown_lags
from eotattn.plotting import mosaic, plot_depth_grid, plot_length_curves, plot_log_prior_by_lag, title_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_retrieval"]


def draw_retrieval(study: RetrievalStudy) -> Figure:
    """Figure 3: (a, b) accuracy against length, (c) the learned log-prior; below, accuracy by length and depth.

    Points are means over depths and seeds, bars reach from the lowest to the highest seed.
    """
    columns = len(study.variants)
    curves = [["passkey"] * (columns // 3) + ["needle"] * (columns // 3) + ["prior"] * (columns - 2 * (columns // 3))]
    maps = [[f"{task} {variant}" for variant in study.variants] for task in SCORES]
    figure, axes = mosaic(curves + maps, size=(16.5, 8.6), heights=(1.55, 1, 1))
    for task, quantity in SCORES.items():
        _draw_curves(study, task, axes[task])
        axes[task].set_ylabel(f"{task}: {quantity.replace('_', ' ')}")
        axes[task].legend().remove()  # one above all panels covers no curve
    handles, labels = axes["passkey"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    _draw_prior(study, axes["prior"])
    for name, task in ((f"{task} {variant}", task) for task in SCORES for variant in study.variants):
        variant = name.removeprefix(f"{task} ")
        grid = study.scores(variant, task).mean(0)
        recipe = study.recipe
        plot_depth_grid(
            grid, lengths=recipe.lengths, depths=recipe.depths, train_length=recipe.task.length, axes=axes[name]
        )
        axes[name].set_title(f"{VARIANT_NAMES[variant]}: {task}", fontsize=8.5)
    axes[maps[0][0]].set_ylabel("depth", fontsize=9)
    axes[maps[1][0]].set_ylabel("depth", fontsize=9)
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
        curves[VARIANT_NAMES[variant]] = mean
        errors[VARIANT_NAMES[variant]] = [mean - seeds.min(0), seeds.max(0) - mean]
    plot_length_curves(study.recipe.lengths, curves, train_length=study.recipe.task.length, errors=errors, axes=axes)
    axes.set_ylim(-0.04, 1.14)  # room for the mark of the training length above accuracy one


def _draw_prior(study: RetrievalStudy, axes: Axes) -> None:
    log_prior = study.of("goat")[0].arrays["log_prior"]
    lags = shown_lags(log_prior.shape[-1])
    by_head = log_prior.reshape(-1, log_prior.shape[-1])[:, lags]
    plot_log_prior_by_lag(by_head, lags=lags, train_length=study.recipe.task.length, axes=axes)
