"""Figure 1 as printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eotattn.experiments.figures.captions import title_panels
from eotattn.experiments.prior_parts import centre_rows
from eotattn.experiments.studies.copy_mixture import CopyMixtureStudy
from eotattn.plotting import panels, plot_causal_prior, plot_key_only, plot_relative, plot_row_centred

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_copy_mixture"]


def draw_copy_mixture(study: CopyMixtureStudy, *, seed: int = 0, head: int = 0) -> Figure:
    """Figure 1: (a) key-only part, (b) relative part, (c) row-centred sum, (d) induced causal prior of one head."""
    figure, grid = panels(2, 2, size=(9.2, 7.4))
    parts = study.readers[study.recipe.seeds.index(seed)].parts
    plot_key_only(parts.key_only[head : head + 1].numpy(), axes=grid[0, 0])
    lags = np.arange(1, parts.relative.shape[-1] + 1)
    plot_relative(parts.relative[head : head + 1].numpy(), lags=lags, axes=grid[0, 1])
    grid[0, 1].set_xlabel("lag to the predicted token, i + 1 − j (tokens)")
    _mark(grid[0, 0], 0, float(parts.key_only[head, 0]), "first token")
    _mark(grid[0, 1], 1, float(parts.relative[head, 0]), "lag one")
    plot_row_centred(centre_rows(parts.total[head]).numpy(), axes=grid[1, 0])
    plot_causal_prior(parts.total[head].softmax(-1).numpy(), axes=grid[1, 1])
    title_panels([axes for row in grid for axes in row], ("key-only part", "relative part", "row-centred log-prior", "induced causal prior"))
    return figure


def _mark(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(14, -4), textcoords="offset points", fontsize=9, va="center")
