"""The figures of an analysis."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eotattn.analysis.summary import Summary
from eotattn.analysis.tables import Curve, layer_curves, residual_curves
from eotattn.diagnostics import ImplicitPriorReport
from eotattn.diagnostics.gauge import centre_rows
from eotattn.plotting import panels, plot_causal_prior, plot_key_only, plot_relative, plot_row_centred, title_panels
from eotattn.plotting.head_plots import plot_head_grid, plot_lag_profile, plot_layer_curves, plot_margin_split

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figures", "prior_panels"]

#: Positions that prior panels show.
SHOWN_POSITIONS = 48


def figures(analysis: Summary) -> Iterator[tuple[str, Axes]]:
    """Name and Axes of one figure after the other; whoever takes one closes it."""
    yield from _grids(analysis)
    yield from _curves(analysis)
    mean = analysis.heads.mean
    if np.isfinite(mean["content margin"]).any():
        layers = analysis.heads.numbers
        yield "margins", plot_margin_split(mean["content margin"], mean["prior margin"], layers=layers)
    for a, (number, layer) in enumerate(zip(analysis.heads.numbers, analysis.heads.layers, strict=True)):
        profile = analysis.heads.lag_profile[a]
        names = [f"head {head}" for head, _ in zip(analysis.heads.heads, profile, strict=False)]
        axes = plot_lag_profile(profile, labels=names)
        axes.set_title(layer, fontsize=9)
        yield f"lags_{number}", axes
        if layer in analysis.priors:
            yield from _of_priors(analysis, a, names)


def _grids(analysis: Summary) -> Iterator[tuple[str, Axes]]:
    heads = analysis.heads
    sink, entropy = heads.quantities[0].name, "normalised entropy"
    draw = partial(plot_head_grid, numbers=(heads.numbers, heads.heads), low=0)
    yield "sink_mass", draw(heads.mean[sink], label=sink, high=1)
    yield "entropy", draw(heads.mean[entropy], label=entropy, high=1)
    if np.isfinite(analysis.explained()).any():  # a head that is uniform leaves nothing to explain
        label = "KL explained by position" + (" (in sample)" if analysis.is_in_sample else "")
        fails = analysis.fails()
        if not fails.all():
            yield "explained", draw(analysis.explained(), label=label, high=1, hatched=fails)
    drains = heads.mean.get("relative drain of the sink")
    if drains is not None and np.isfinite(drains).any():
        yield "value_drain", draw(drains, label="value drain of the sink / mean")


def _curves(analysis: Summary) -> Iterator[tuple[str, Axes]]:
    label = "mean over heads" + (" and its 95% interval" if analysis.heads.num_sequences > 1 else "")
    yield "layers", plot_layer_curves(**_drawn(layer_curves(analysis)), ylabel=label, layers=analysis.heads.numbers)
    if analysis.residuals.blocks:
        axes = plot_layer_curves(**_drawn(residual_curves(analysis)), ylabel="norm of the residual stream")
        axes.set_yscale("log")
        yield "residual_norms", axes


def _drawn(curves: dict[str, Curve]) -> dict[str, Any]:
    """As :func:`plot_layer_curves` takes them."""
    means = {name: mean for name, (mean, *_) in curves.items()}
    return {"curves": means, "intervals": {name: (low, high) for name, (_, low, high) in curves.items()}}


def prior_panels(report: ImplicitPriorReport, head: int, *, length: int = SHOWN_POSITIONS) -> Figure:
    """The paper's figure 1 for one head of a fitted prior: u(j), kappa(t), the row-centred sum, the induced prior."""
    length = min(length, report.key.shape[1])
    reach = report.key.shape[1] - 1
    lags = np.arange(1 - length, length)
    lags = lags[np.isfinite(report.lag[head, lags + reach])]  # not those that a mask excludes
    figure, grid = panels(2, 2, size=(9.2, 7.4))
    plot_key_only(np.nan_to_num(report.key[head : head + 1, :length]), axes=grid[0, 0])
    plot_relative(report.lag[head : head + 1, lags + reach], lags=lags, axes=grid[0, 1])
    positions = torch.arange(length)
    with torch.no_grad():
        total = report.prior().dense(positions, positions, dtype=torch.float64)[head]
    hidden = np.isnan(report.lag[head, positions[:, None] - positions + reach])
    total = total.masked_fill(torch.from_numpy(hidden), -torch.inf)
    plot_row_centred(centre_rows(total).numpy(), axes=grid[1, 0])
    plot_causal_prior(total.softmax(-1).numpy(), axes=grid[1, 1])
    names = ("key-only part", "relative part", "row-centred log-prior", "induced prior")
    title_panels([axes for row in grid for axes in row], names)
    return figure


def _of_priors(analysis: Summary, a: int, names: list[str]) -> Iterator[tuple[str, Axes]]:
    """The key-only parts of a layer, and the prior of the head that position explains best; none of failed fits."""
    number, layer = analysis.heads.numbers[a], analysis.heads.layers[a]
    report, explained = analysis.priors[layer], analysis.explained()[a].copy()
    sample = ", in sample" if analysis.is_in_sample else ""
    fails = analysis.fails()[a]
    explained[fails] = np.nan
    shown = np.flatnonzero(~fails[: len(report.key)])
    if not shown.size:
        return
    axes = plot_key_only(np.nan_to_num(report.key[shown]), labels=[names[h] for h in shown])
    axes.set_title(f"{layer}: u(j) of the implicit prior{sample}", fontsize=9)
    yield f"key_only_{number}", axes
    head = int(shown[0]) if np.isnan(explained).all() else int(np.nanargmax(explained))
    figure = prior_panels(report, head)
    share = "" if np.isnan(explained[head]) else f": {explained[head]:.0%} explained by position{sample}"
    figure.suptitle(f"{layer}, head {analysis.heads.heads[head]}{share}", fontsize=10)
    yield f"prior_{number}", figure.axes[0]
