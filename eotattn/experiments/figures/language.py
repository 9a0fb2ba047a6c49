"""Figure 2 as printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eotattn.experiments.figures.captions import VARIANT_NAMES, title_panels
from eotattn.experiments.studies.language import LanguageStudy
from eotattn.plotting import (
    line_styles,
    panels,
    plot_key_only,
    plot_length_curves,
    plot_sink_mass,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_language"]


def draw_language(study: LanguageStudy) -> Figure:
    """Figure 2: (a) bits per byte against context length, (b) learned u(j), (c) sink mass against signal strength."""
    figure, grid = panels(1, 3, size=(13.5, 4.1))
    left, middle, right = grid[0]
    recipe = study.recipe
    names = [decoder.attention for decoder in recipe.variants]
    curves = {VARIANT_NAMES[name]: list(study.bits_per_byte(name).values()) for name in names}
    plot_length_curves(recipe.lengths, curves, train_length=recipe.train_length, axes=left)
    close = {VARIANT_NAMES[name]: curves[VARIANT_NAMES[name]] for name in ("alibi", "goat")}
    _enlarge(left, recipe.lengths, close, order=list(curves))
    _draw_key_only(study, middle)
    contrast = [name for name in names if name in ("rope", "goat")]
    reports = {VARIANT_NAMES[name]: study.of(name)[0].sinks for name in contrast}
    plot_sink_mass(reports, uniform_mass=study.uniform_mass, order=list(curves), axes=right)
    title_panels((left, middle, right), ("length extrapolation", "learned key-only part", "sink mass"))
    return figure


def _draw_key_only(study: LanguageStudy, axes: Axes) -> None:
    """u(j) of every block of the first seed's GOAT decoder, averaged over heads, out to twice the training length."""
    key_only = study.of("goat")[0].key_only
    assert key_only is not None
    shown = key_only[:, :, : 2 * study.recipe.train_length].mean(1)
    labels = [f"block {b + 1}" for b in range(shown.shape[0])]
    plot_key_only(shown.numpy(), labels=labels, train_length=study.recipe.train_length, axes=axes)


def _enlarge(axes: Axes, lengths: Sequence[int], curves: dict[str, list[float]], *, order: list[str]) -> None:
    """Repeat curves in an inset at their own scale."""
    inset = axes.inset_axes((0.45, 0.17, 0.52, 0.27))
    styles = line_styles(list(curves), order)
    for name, values in curves.items():
        inset.plot(lengths, values, **(styles[name] | {"markersize": 4}))
    inset.set_xscale("log", base=2)
    inset.set_xticks([])
    inset.tick_params(labelsize=8)
    inset.margins(y=0.15)
    inset.settitle_panels("enlarged", fontsize=8, pad=2, color="0.3")
    axes.legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1.0, 0.63))
