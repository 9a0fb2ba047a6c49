"""The ablations as printed: every variant by each of four numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eotattn.experiments.figures.captions import title_panels
from eotattn.experiments.recipes.ablations import VARIANTS
from eotattn.experiments.studies.ablations import AblationStudy
from eotattn.plotting import panels, plot_ranking

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
        axes.set_xlabel("bits per byte" if values is language else "accuracy, mean of both tasks")
        if k:
            axes.set_yticklabels([])
    places = ("training length", f"{far}x", "training length", f"{far}x")
    what = ("language", "language", "retrieval", "retrieval")
    references = ("RoPE", "ALiBi", "RoPE", "ALiBi")
    titles = [f"{w}, {p} (dashed: {r})" for w, p, r in zip(what, places, references, strict=True)]
    title_panels(grid[0], tuple(titles))
    return figure
