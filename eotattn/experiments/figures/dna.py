"""Figure 4 as printed."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from eotattn.experiments.figures.captions import VARIANT_NAMES
from eotattn.experiments.intervals import SeedInterval
from eotattn.experiments.studies.dna import SHOWN_PROMPT, DnaStudy
from eotattn.plotting import line_styles, mosaic, title_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_dna"]

#: Colour of what the generator itself reaches.
GENERATOR = "0.35"


def draw_dna(study: DnaStudy) -> Figure:
    """Figure 4: (a) validation, (b) loss by seed, (c) by context, (d) GC trajectory, (e) its correlation, (f) speed."""
    figure, axes = mosaic(["abc", "def"], size=(13.5, 7.4), heights=(1, 1))
    seeds, correlations = axes["b"], axes["e"]
    _draw_validation(study, axes["a"])
    _draw_points(study, seeds, {v: [float(r.value("bits_per_base")) for r in study.of(v)] for v in study.variants})
    _draw_floor(study, seeds, "bits_per_base")
    seeds.set_ylabel("held-out bits per base")
    _draw_context(study, axes["c"])
    _draw_trajectory(study, axes["d"])
    _draw_points(study, correlations, {v: study.gc_correlations(v) for v in study.variants})
    if study.best_gc_correlation is not None:
        correlations.axhline(study.best_gc_correlation, color=GENERATOR, linestyle=":", label="true distribution")
        correlations.legend(frameon=False, fontsize=9)
    correlations.set_ylabel("correlation of GC content,\nsampled and true continuations")
    _draw_speed(study, axes["f"])
    titles = ("validation", "loss by seed", "loss by context", "GC trajectory", "GC correlation", "training")
    title_panels(axes.values(), titles)
    return figure


def _styles(study: DnaStudy) -> dict[str, dict[str, Any]]:
    return line_styles(list(study.variants))


def _draw_validation(study: DnaStudy, axes: Axes) -> None:
    """Mean over seeds of the loss on the first held-out windows, against the step."""
    for variant, style in _styles(study).items():
        curves = [record.rows_of("validation_loss") for record in study.of(variant)]
        steps = [row["step"] for row in curves[0] if row["step"] > 0]
        values = np.array([[row["value"] for row in curve if row["step"] > 0] for curve in curves])
        axes.plot(steps, values.mean(0), label=VARIANT_NAMES[variant], **(style | {"markersize": 3.5}))
        axes.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("validation NLL (nats per base)")
    axes.legend(frameon=False, fontsize=9)


def _draw_points(study: DnaStudy, axes: Axes, values: dict[str, list[float]]) -> None:
    """One small mark a seed, and the mean with its 95 % interval."""
    for place, (variant, style) in enumerate(_styles(study).items()):
        interval = SeedInterval.of(values[variant])
        axes.plot([place + 0.12] * len(values[variant]), values[variant], "o", color=style["color"], markersize=3.5)
        width = 0 if math.isnan(interval.half_width) else interval.half_width
        axes.errorbar([place - 0.12], [interval.mean], yerr=[width], capsize=4, **style)
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.set_xticks(range(len(values)), [VARIANT_NAMES[variant].replace(", ", ",\n") for variant in values])


def _draw_floor(study: DnaStudy, axes: Axes, quantity: str) -> None:
    if study.generator is None:
        return
    value = float(study.generator.value(quantity))
    axes.axhline(value, color=GENERATOR, linestyle=":", label="the generator itself")
    axes.legend(frameon=False, fontsize=9)


def _draw_context(study: DnaStudy, axes: Axes) -> None:
    """Loss against the number of bases seen, averaged in windows that double."""
    length = study.recipe.length
    edges = np.unique(np.geomspace(1, length, 2 + int(2 * math.log2(length))).astype(int)) - 1
    centres = (edges[:-1] + edges[1:] + 2) / 2
    for variant, style in _styles(study).items():
        losses = np.mean([record.arrays["position_loss"] for record in study.of(variant)], axis=0)
        axes.plot(centres, _binned(losses, edges), label=VARIANT_NAMES[variant], **(style | {"markersize": 3.5}))
    if study.generator is not None:
        floor = _binned(study.generator.arrays["position_loss"], edges)
        axes.plot(centres, floor, color=GENERATOR, linestyle=":", label="the generator itself")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bases seen")
    axes.set_ylabel("held-out NLL (nats per base)")
    axes.legend(frameon=False, fontsize=9)


def _binned(values: np.ndarray, edges: np.ndarray) -> list[float]:
    return [float(values[low:high].mean()) for low, high in pairwise(edges)]


def _draw_trajectory(study: DnaStudy, axes: Axes) -> None:
    """GC fraction of one prompt, its true continuation and those sampled with the first seed."""
    prompt, window = SHOWN_PROMPT, study.recipe.generation.gc_window
    first = study.of(study.variants[0])[0].arrays
    known, true = first["gc_prompt"][prompt], first["gc_true"][prompt]
    at = window * (np.arange(len(known) + len(true)) + 0.5)
    axes.plot(at, np.concatenate([known, true]), color="black", linewidth=1.6, label="genome")
    for variant, style in _styles(study).items():
        sampled = study.of(variant)[0].arrays["gc_sampled"][prompt]
        axes.plot(at[len(known) :], sampled, label=VARIANT_NAMES[variant], **(style | {"markersize": 3.5}))
    axes.axvline(window * len(known), color="0.45", linestyle="--", linewidth=1)
    axes.annotate(
        "end of the prompt ", (window * len(known), 0.97), xycoords=("data", "axes fraction"), fontsize=8, ha="right"
    )
    axes.set_xlabel("position (bases)")
    axes.set_ylabel(f"GC fraction of {window} bases")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=9)


def _draw_speed(study: DnaStudy, axes: Axes) -> None:
    """Throughput and peak memory of a training step over those of fused RoPE."""
    table = study.speed_table()[::-1]
    places = np.arange(len(table))
    colours = [style["color"] for style in line_styles(["throughput", "memory"]).values()]
    ratios = [row["throughput ratio"] for row in table]
    axes.barh(places + 0.2, ratios, height=0.36, color=colours[0], label="throughput")
    _label(axes, places + 0.2, ratios)
    if all("memory ratio" in row for row in table):
        ratios = [row["memory ratio"] for row in table]
        axes.barh(places - 0.2, ratios, height=0.36, color=colours[1], label="peak memory")
        _label(axes, places - 0.2, ratios)
    axes.axvline(1, color="0.45", linestyle="--", linewidth=1)
    axes.set_yticks(places, [row["variant"] for row in table], fontsize=8)
    axes.set_xlabel("ratio to fused RoPE")
    axes.margins(x=0.2)
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def _label(axes: Axes, places: np.ndarray, values: list[float]) -> None:
    for place, value in zip(places, values, strict=True):
        axes.annotate(f" {value:.2f}", (value, place), fontsize=8, va="center")
