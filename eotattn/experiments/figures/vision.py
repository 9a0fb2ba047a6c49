"""Figure 5 as printed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from eotattn.experiments.studies.vision import VisionStudy
from eotattn.plotting import line_styles, mosaic, title_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["POSITION_NAMES", "draw_vision"]

#: Names in legends.
POSITION_NAMES = {"goat": "GOAT", "learned": "learned absolute", "sinusoidal": "2-D sinusoidal", "none": "no positions"}


def draw_vision(study: VisionStudy) -> Figure:
    """Figure 5: (a) accuracy by resolution, (b) mean log-prior by lag, (c) by distance, (d) to (f) single heads."""
    figure, axes = mosaic(["abc", "def"], size=(13.5, 7.6), heights=(1, 1))
    _draw_accuracy(study, axes["a"])
    lag_maps = study.prior("lag_map")
    _draw_lag_map(lag_maps.mean((0, 1, 2)), axes["b"])
    _draw_profiles(lag_maps, axes["c"])
    titles = ["accuracy by resolution", "learned log-prior, mean", "learned log-prior by distance"]
    strongest = list(np.argsort(-study.prior("strength")[0].flatten()))
    for letter in "def":
        if not strongest:
            axes[letter].set_axis_off()
            continue
        block, head = np.unravel_index(strongest.pop(0), lag_maps.shape[1:3])
        _draw_lag_map(lag_maps[0, block, head], axes[letter])
        titles.append(f"block {block + 1}, head {head + 1}, seed {study.recipe.seeds[0]}")
    title_panels(axes.values(), tuple(titles))
    return figure


def _draw_accuracy(study: VisionStudy, axes: Axes) -> None:
    """Mean and 95 % interval over seeds; dashed where positions are counted in patches."""
    sizes = study.recipe.sizes
    for variant, style in line_styles(list(study.variants)).items():
        for unit, line in (("image", "-"), ("patch", "--")):
            if unit == "patch" and variant == "learned":
                continue
            found = [study.accuracy(variant, size, unit) for size in sizes]
            bars = [0.0 if math.isnan(one.half_width) else one.half_width for one in found]
            name = POSITION_NAMES[variant] + (", in patches" if unit == "patch" else "")
            means = [one.mean for one in found]
            axes.errorbar(sizes, means, yerr=bars, capsize=3, label=name, **(style | {"linestyle": line}))
    axes.set_xticks(sizes, [f"{size}\n({size / sizes[0]:.2g}x)" for size in sizes])
    axes.set_xlabel("resolution (pixels a side)")
    axes.set_ylabel("held-out accuracy")
    axes.set_ylim(0, 1.03)
    axes.legend(frameon=False, fontsize=8, handlelength=4, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2)


def _draw_lag_map(lag_map: np.ndarray, axes: Axes) -> None:
    """One map of lags, zero in white, the query in the middle."""
    reach = lag_map.shape[-1] // 2
    extreme = max(float(np.abs(lag_map).max()), 1e-9)
    extent = (-reach - 0.5, reach + 0.5, reach + 0.5, -reach - 0.5)
    image = axes.imshow(lag_map, cmap="RdBu_r", vmin=-extreme, vmax=extreme, extent=extent, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="row-centred log-prior (nats)", shrink=0.85)
    axes.plot(0, 0, "+", color="black", markersize=7)
    axes.set_xlabel("column lag (patches)")
    axes.set_ylabel("row lag (patches)")


def _draw_profiles(lag_maps: np.ndarray, axes: Axes) -> None:
    """Log-prior against distance, averaged over directions, heads and seeds; one line a block."""
    reach = lag_maps.shape[-1] // 2
    lags = np.arange(-reach, reach + 1)
    distance = np.round(np.hypot(*np.meshgrid(lags, lags))).astype(int)
    reached = range(reach + 1)
    names = [f"block {b + 1}" for b in range(lag_maps.shape[1])]
    for b, style in enumerate(line_styles(names).values()):
        profiles = np.stack([lag_maps[:, b][..., distance == d].mean((1, 2)) for d in reached], axis=-1)
        axes.plot(list(reached), profiles.mean(0), label=names[b], **style)
        axes.fill_between(list(reached), profiles.min(0), profiles.max(0), color=style["color"], alpha=0.2, linewidth=0)
    axes.axhline(0, color="0.75", linewidth=0.8, zorder=0)
    axes.set_xlabel("distance of query and key (patches)")
    axes.set_ylabel("row-centred log-prior (nats)")
    axes.legend(frameon=False, fontsize=9)
