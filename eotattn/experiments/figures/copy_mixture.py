"""Figure 1 as printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eotattn.diagnostics.gauge import centre_rows
from eotattn.experiments.studies.copy_mixture import BOUND, CopyMixtureStudy
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
    from matplotlib.figure import Figure

__all__ = ["draw_copy_mixture"]


def draw_copy_mixture(study: CopyMixtureStudy, *, seed: int = 0, head: int = 0) -> Figure:
    """Figure 1: (a) to (d) show one head as the paper does, (e) and (f) how all seeds got there.

    (a) key-only part, (b) relative part, (c) row-centred sum, (d) induced causal prior.
    """
    figure, grid = panels(2, 3, size=(13.8, 7.4))
    (key_only, relative, formation), (centred, induced, loss) = grid
    parts = study.readers[study.recipe.seeds.index(seed)].parts
    plot_key_only(parts.key_only[head : head + 1].numpy(), axes=key_only)
    lags = np.arange(1, parts.relative.shape[-1] + 1)
    plot_relative(parts.relative[head : head + 1].numpy(), lags=lags, axes=relative)
    relative.set_xlabel("lag to the predicted token, i + 1 − j (tokens)")
    _mark(key_only, 0, float(parts.key_only[head, 0]), "first token")
    _mark(relative, 1, float(parts.relative[head, 0]), "lag one")
    plot_row_centred(centre_rows(parts.total[head]).numpy(), axes=centred)
    plot_causal_prior(parts.total[head].softmax(-1).numpy(), axes=induced)
    _draw_formation(study, formation)
    _draw_loss(study, loss)
    titles = ("key-only part", "relative part", "row-centred log-prior", "induced causal prior", "formation", "loss")
    title_panels([key_only, relative, centred, induced, formation, loss], titles)
    return figure


def _draw_formation(study: CopyMixtureStudy, axes: Axes) -> None:
    """Mass on the first token, and closeness to the ideal log-prior, against training steps; one line a seed."""
    colours = {"mass_on_first_token": OKABE_ITO["blue"], "correlation": OKABE_ITO["vermillion"]}
    labels = {"mass_on_first_token": "mass on the first token", "correlation": "correlation with the ideal log-prior"}
    for quantity, colour in colours.items():
        for k, reader in enumerate(study.readers):
            rows = [row for row in reader.record.rows_of(quantity) if row["panel"] == "e"]
            label = labels[quantity] if k == 0 else None
            axes.plot([r["step"] for r in rows], [r["value"] for r in rows], color=colour, linewidth=1.3, label=label)
    ideal = float(study.recipe.task.ideal_attention()[:, 0].mean())
    axes.axhline(ideal, color=colours["mass_on_first_token"], linestyle=":", label="mass under the ideal attention")
    axes.axhline(BOUND, color=colours["correlation"], linestyle=":", label=f"bound, {BOUND}")
    axes.set_xlabel("training step")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_loss(study: CopyMixtureStudy, axes: Axes) -> None:
    """Training loss, one line a seed, beside what the generator itself would reach on fresh sequences."""
    for k, reader in enumerate(study.readers):
        rows = reader.record.rows_of("training_loss")
        label = "training loss" if k == 0 else None
        axes.plot(
            [r["step"] for r in rows], [r["value"] for r in rows], color=OKABE_ITO["blue"], linewidth=1.3, label=label
        )
    best = np.mean([reader.record.value("best_loss") for reader in study.readers])
    axes.axhline(float(best), color="0.35", linestyle=":", label="the generator itself")
    axes.set_xlabel("training step")
    axes.set_ylabel("nats a token")
    axes.legend(frameon=False, fontsize=8)


def _mark(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(14, -4), textcoords="offset points", fontsize=9, va="center")
