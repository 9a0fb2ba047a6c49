"""Figure 2 as printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eotattn.experiments.figures.captions import VARIANT_NAMES
from eotattn.experiments.studies.language_study import LanguageStudy, mean_formation
from eotattn.plotting import (
    line_styles,
    panels,
    plot_key_only,
    plot_length_curves,
    plot_sink_mass,
    shade_lines,
    title_panels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_language"]


def draw_language(study: LanguageStudy) -> Figure:
    """Figure 2: (a) and (b) bits per byte by context, (c) u(j), (d) sink mass by signal and (e) by step, (f) rates."""
    figure, grid = panels(2, 3, size=(15.5, 8.6))
    (curves, close, key_only), (by_signal, by_step, rates) = grid
    order = [_label(decoder.attention) for decoder in study.recipe.variants + study.recipe.contrasts]
    _draw_curves(study, order, order, curves)
    _draw_readings(study, order, curves)
    _draw_curves(study, [_label(name) for name in ("alibi", *study.headline)], order, close)
    _draw_key_only(study, study.movable, key_only)
    reports = {_label(name): study.of(name)[0].sinks for name in ("rope", *study.learned)}
    plot_sink_mass(reports, uniform_mass=study.uniform_mass, order=order, axes=by_signal)
    _draw_formation(study, by_step, order)
    _draw_sweep(study, rates, order)
    shown = f"learned u(j), {_label(study.movable)}"
    titles = ("length extrapolation", "the close curves", shown, "sink mass", "sink formation", "choice of rates")
    title_panels([curves, close, key_only, by_signal, by_step, rates], titles)
    handles, labels = curves.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=-(-len(labels) // 2), frameon=False, fontsize=9)
    for axes in (curves, close):
        axes.legend().remove()  # one above all panels covers no curve
    return figure


def _label(name: str) -> str:
    return VARIANT_NAMES.get(name, name)


def _draw_curves(study: LanguageStudy, labels: list[str], order: list[str], axes: Axes) -> None:
    """Means and 95 % intervals over seeds."""
    recipe = study.recipe
    found = {
        _label(name): [study.interval(name, length) for length in recipe.lengths]
        for name in study.names
        if _label(name) in labels
    }
    curves = {label: [interval.mean for interval in intervals] for label, intervals in found.items()}
    errors = {label: [interval.half_width for interval in intervals] for label, intervals in found.items()}
    plot_length_curves(recipe.lengths, curves, errors=errors, train_length=recipe.train_length, order=order, axes=axes)


def _draw_readings(study: LanguageStudy, order: list[str], axes: Axes) -> None:
    """Trained decoders read with other positions: the colour of the decoder, broken lines."""
    styles = line_styles(order)
    for (kind, trained), dashes in zip(study.recipe.readings, ("--", ":", "-."), strict=False):
        means = [study.interval(kind, length).mean for length in study.recipe.lengths]
        axes.plot(
            study.recipe.lengths, means, linestyle=dashes, color=styles[_label(trained)]["color"], label=_label(kind)
        )


def _draw_sweep(study: LanguageStudy, axes: Axes, order: list[str]) -> None:
    """Bits per byte on validation files against the learning rate; a ring marks the chosen rate."""
    rows, styles = study.sweep_table(), line_styles(order)
    for decoder in study.recipe.variants:
        label = _label(decoder.attention)
        found = [row for row in rows if row["variant"] == decoder.attention]
        axes.plot(
            [r["learning_rate"] for r in found], [r["bits_per_byte"] for r in found], label=label, **styles[label]
        )
        chosen = [(r["learning_rate"], r["bits_per_byte"]) for r in found if r["chosen"]]
        axes.plot(*zip(*chosen, strict=True), "o", markersize=11, fillstyle="none", color=styles[label]["color"])
    rates = study.recipe.sweep.rates
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel("bits per byte, validation files, short runs")


def _draw_key_only(study: LanguageStudy, name: str, axes: Axes) -> None:
    """u(j) of every block of the first seed's decoder, averaged over heads, out to twice the training length."""
    key_only = study.of(name)[0].key_only
    assert key_only is not None
    shown = key_only[:, :, : 2 * study.recipe.train_length].mean(1)
    labels = [f"block {b + 1}" for b in range(shown.shape[0])]
    plot_key_only(shown.numpy(), labels=labels, train_length=study.recipe.train_length, axes=axes)
    if len(labels) > 3:
        shade_lines([line for line in axes.get_lines() if line.get_label() in labels])
    axes.legend(frameon=False, fontsize=8, ncols=1 + len(labels) // 6)


def _draw_formation(study: LanguageStudy, axes: Axes, order: list[str]) -> None:
    """Mass on the first token while training, averaged over blocks, heads and queries; the band spans the seeds."""
    styles = line_styles(order)
    for decoder in study.recipe.variants:
        label = _label(decoder.attention)
        steps, mass = mean_formation(study.of(decoder.attention))
        axes.plot(steps, mass.mean(0), label=label, **(styles[label] | {"markersize": 3.5}))
        axes.fill_between(steps, mass.min(0), mass.max(0), color=styles[label]["color"], alpha=0.2, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("mass on the first token, mean over queries")
