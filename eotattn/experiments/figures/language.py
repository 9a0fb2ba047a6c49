"""Figure 2 as printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from eotattn.experiments.figures.captions import VARIANT_NAMES, title_panels
from eotattn.experiments.studies.language_study import LanguageStudy, mean_formation
from eotattn.plotting import line_styles, panels, plot_key_only, plot_length_curves, plot_sink_mass

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_language"]


def draw_language(study: LanguageStudy) -> Figure:
    """Figure 2: (a) bits per byte by context, (b) learned u(j), (c) sink mass by signal strength, (d) by step."""
    figure, grid = panels(2, 2, size=(11.5, 8.2))
    curves, key_only, by_signal, by_step = axes = [axes for row in grid for axes in row]
    order = [VARIANT_NAMES.get(name, name) for name in study.names]
    _draw_curves(study, curves, order)
    _draw_key_only(study, study.learned[0], key_only)
    shown = ("rope", *study.learned)
    reports = {VARIANT_NAMES.get(name, name): study.of(name)[0].sinks for name in shown}
    plot_sink_mass(reports, uniform_mass=study.uniform_mass, order=order, axes=by_signal)
    _draw_formation(study, by_step, order)
    title = f"learned key-only part of {VARIANT_NAMES.get(study.learned[0], study.learned[0])}"
    title_panels(axes, ("length extrapolation", title, "sink mass", "sink formation"))
    return figure


def _draw_curves(study: LanguageStudy, axes: Axes, order: list[str]) -> None:
    """Means and 95 % intervals over seeds; the close curves once more at their own scale."""
    lengths = study.recipe.lengths
    found = {name: [study.interval(name, length) for length in lengths] for name in study.names}
    curves = {VARIANT_NAMES.get(name, name): [i.mean for i in intervals] for name, intervals in found.items()}
    errors = {VARIANT_NAMES.get(name, name): [i.half_width for i in intervals] for name, intervals in found.items()}
    plot_length_curves(lengths, curves, errors=errors, train_length=study.recipe.train_length, order=order, axes=axes)
    close = [VARIANT_NAMES.get(name, name) for name in ("alibi", *study.learned)]
    _enlarge(axes, lengths, {name: curves[name] for name in close}, {name: errors[name] for name in close}, order)


def _draw_key_only(study: LanguageStudy, name: str, axes: Axes) -> None:
    """u(j) of every block of the first seed's decoder, averaged over heads, out to twice the training length."""
    key_only = study.of(name)[0].key_only
    assert key_only is not None
    shown = key_only[:, :, : 2 * study.recipe.train_length].mean(1)
    labels = [f"block {b + 1}" for b in range(shown.shape[0])]
    plot_key_only(shown.numpy(), labels=labels, train_length=study.recipe.train_length, axes=axes)


def _draw_formation(study: LanguageStudy, axes: Axes, order: list[str]) -> None:
    """Mass on the first token while training, averaged over blocks, heads and queries; the band spans the seeds."""
    names = [decoder.attention for decoder in study.recipe.variants]
    labels = {name: VARIANT_NAMES.get(name, name) for name in names}
    styles = line_styles(list(labels.values()), order)
    for name, label in labels.items():
        steps, mass = mean_formation(study.of(name))
        axes.plot(steps, mass.mean(0), label=label, **(styles[label] | {"markersize": 3.5}))
        axes.fill_between(steps, mass.min(0), mass.max(0), color=styles[label]["color"], alpha=0.2, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("mass on the first token, mean over queries")
    axes.legend(frameon=False, fontsize=9)


def _enlarge(
    axes: Axes,
    lengths: Sequence[int],
    curves: dict[str, list[float]],
    errors: dict[str, list[float]],
    order: list[str],
) -> None:
    """Repeat curves in an inset at their own scale."""
    inset = axes.inset_axes((0.08, 0.5, 0.42, 0.4))
    styles = line_styles(list(curves), order)
    for name, values in curves.items():
        bars = np.nan_to_num(errors[name])
        inset.errorbar(lengths, values, yerr=bars, capsize=2, **(styles[name] | {"markersize": 4}))
    inset.set_xscale("log", base=2)
    inset.set_xticks([])
    inset.tick_params(labelsize=8)
    inset.margins(y=0.15)
    inset.set_title("enlarged", fontsize=8, pad=2, color="0.3")
