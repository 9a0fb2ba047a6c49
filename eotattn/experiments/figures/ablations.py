"""The ablations as printed: every variant by each of four numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eotattn.experiments.recipes.ablations import VARIANTS
from eotattn.experiments.studies.ablations import AblationStudy
from eotattn.plotting import panels, plot_ranking, title_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_ablations"]


def draw_ablations(study: AblationStudy) -> Figure:
    """A row a variant, best language first: (a) and (b) language near and far, (c) and (d) retrieval near and far.

    Dashed lines stand at RoPE near and at ALiBi far; variants that pass all four stand out.
    """
    language = {name: study.values(name, "language") for name in study.variants}
    retrieval = {name: study.retrieval(name) for name in study.variants}
    order = sorted(study.variants, key=lambda name: float(language[name][:, 0].mean()))
    figure, grid = panels(1, 4, size=(15.0, 1.3 + 0.26 * len(order)))
    answers, far = study.answers(), study.recipe.length_factors[-1]
    for k, (axes, values) in enumerate(zip(grid[0], (language, language, retrieval, retrieval), strict=True)):
        plot_ranking(
            {name: values[name][:, -(k % 2)] for name in order},  # the first length, or the last
            labels=VARIANTS,
            highlight=answers,
            reference="alibi" if k % 2 else "rope",
            logarithmic=values is language,
            axes=axes,
        )
        what = "bits per byte" if values is language else "accuracy, mean of both tasks"
        axes.set_xlabel(f"{what}\n(dashed: {'ALiBi' if k % 2 else 'RoPE'})")
        if k:
            axes.set_yticklabels([])
    titles = ("language, training length", f"language, {far}x", "retrieval, training length", f"retrieval, {far}x")
    title_panels(grid[0], titles)
    return figure
