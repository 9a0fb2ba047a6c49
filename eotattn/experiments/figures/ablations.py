"""The ablations as printed: quality at the training length against quality far beyond it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eotattn.experiments.figures.captions import title_panels
from eotattn.experiments.recipes.ablations import VARIANTS
from eotattn.experiments.studies.ablations import AblationStudy
from eotattn.plotting import panels, plot_trade_off

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_ablations"]


def draw_ablations(study: AblationStudy) -> Figure:
    """Every variant as a point: (a) language, (b) retrieval; in distribution across, at the longest context upwards."""
    figure, grid = panels(1, 2, size=(13.5, 5.6))
    left, right = grid[0]
    far = study.recipe.length_factors[-1]
    language = {name: study.values(name, "language") for name in study.variants}
    retrieval = {name: study.retrieval(name) for name in study.variants}
    plot_trade_off(_near_and_far(language), logarithmic=True, legend=False, axes=left)
    plot_trade_off(_near_and_far(retrieval), labels=VARIANTS, axes=right)
    left.set(xlabel="bits per byte at the training length", ylabel=f"bits per byte at {far}x")
    right.set(xlabel="retrieval accuracy at the training length", ylabel=f"retrieval accuracy at {far}x")
    title_panels((left, right), ("language: lower left is better", "retrieval: upper right is better"))
    return figure


def _near_and_far(values: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Name -> (S, 2): the first and the last length."""
    return {name: np.stack([found[:, 0], found[:, -1]], axis=-1) for name, found in values.items()}
