"""What all plots share: colours that colour-blind readers can tell apart, and arrays that are checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from eotattn.checks import require

__all__ = [
    "MARKERS",
    "OKABE_ITO",
    "add_legend",
    "head_style",
    "line_styles",
    "mosaic",
    "number_ticks",
    "panels",
    "resolve_axes",
    "shade_lines",
    "title_panels",
    "to_array",
]

#: Okabe and Ito's qualitative palette without yellow, which is too light for lines on white.
OKABE_ITO = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#000000",
}

#: The palette of lines: Okabe and Ito's, and two more for figures with many of them.
COLOURS = (*OKABE_ITO.values(), "#8C6D46", "#999999")

#: Markers in the order of the palette, so that lines differ without colour as well.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "*")

#: Line styles of one turn of the palette after the other.
LINES = ("-", "--", ":", "-.")

#: Entries of a legend inside the axes, and of a column beside them.
INSIDE, COLUMN = 4, 14


def line_styles(names: Sequence[str], order: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of every name: 36 that differ.

    Args:
        names: Names of the lines.
        order: All names of the figure, so that one name looks the same in all of its panels; ``names`` by default.

    Example:
        >>> line_styles(["b"], order=["a", "b"])["b"]["marker"]
        's'
    """
    order = list(names) if order is None else list(order)
    missing = [name for name in names if name not in order]
    require(not missing, "line_styles", "order", "contain every name", missing, "Add the missing names")
    places = {name: order.index(name) for name in names}
    return {
        name: {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": LINES[place // len(COLOURS) % len(LINES)],
            "markersize": 5,
            "linewidth": 1.6,
        }
        for name, place in places.items()
    }


def head_style(head: int) -> dict[str, Any]:
    """Colour and line of one head among many: 28 that differ.

    Example:
        >>> head_style(8)
        {'color': '#D55E00', 'linestyle': '--'}
    """
    colours = list(OKABE_ITO.values())
    return {"color": colours[head % len(colours)], "linestyle": LINES[head // len(colours) % len(LINES)]}


def shade_lines(lines: Sequence[Line2D]) -> None:
    """Colour lines from dark to light, which shows an order that a set of colours does not."""
    for line, shade in zip(lines, mpl.colormaps["cividis"](np.linspace(0, 0.92, len(lines))), strict=True):
        line.set(color=shade, linestyle="-")


def add_legend(axes: Axes, count: int) -> None:
    """A legend of ``count`` entries: inside the axes if they are few, else beside them."""
    if count <= INSIDE:
        axes.legend(frameon=False, fontsize=8)
        return
    columns = -(-count // COLUMN)
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.02), ncols=columns)


def number_ticks(axis: Axis, numbers: Sequence[int] | None) -> None:
    """Ticks at whole places, named by ``numbers`` where not all of a model's heads or layers are shown."""
    axis.set_major_locator(MaxNLocator(integer=True))
    if numbers is not None:
        names = {place: str(number) for place, number in enumerate(numbers)}
        axis.set_major_formatter(FuncFormatter(lambda place, _: names.get(place, "")))


def resolve_axes(axes: Axes | None) -> Axes:
    """Return ``axes``, or those of a new figure of a notebook's width."""
    return plt.subplots(figsize=(4.6, 3.2), layout="constrained")[1] if axes is None else axes


def to_array(owner: str, argument: str, values: ArrayLike, *, num_axes: int) -> NDArray[np.float64]:
    """Return a float64 array of ``num_axes`` axes, or raise in the house's wording."""
    array = np.asarray(values, dtype=np.float64)
    got = f"shape {array.shape}"
    require(array.ndim == num_axes, owner, argument, f"have {num_axes} axes", got, "Select one head, or add an axis")
    require(array.size > 0, owner, argument, "not be empty", got, "Pass at least one value")
    return array


def panels(rows: int, columns: int, *, size: tuple[float, float]) -> tuple[Figure, NDArray[np.object_]]:
    """A figure of ``size`` inches with a (rows, columns) grid of axes that do not overlap."""
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return figure, grid


def mosaic(
    layout: Sequence[Sequence[str]], *, size: tuple[float, float], heights: Sequence[float]
) -> tuple[Figure, dict[str, Axes]]:
    """A figure of ``size`` inches with named axes: a name that is repeated in ``layout`` spans those cells.

    Args:
        layout: Rows of names.
        size: Width and height, inches.
        heights: Relative heights of the rows.
    """
    figure = plt.figure(figsize=size, layout="constrained")
    return figure, figure.subplot_mosaic([list(row) for row in layout], height_ratios=list(heights))


def title_panels(axes: Iterable[Axes], titles: tuple[str, ...]) -> None:
    """Give panels their letters and titles, in order."""
    for letter, panel, title in zip("abcdefgh", axes, titles, strict=False):
        panel.set_title(f"({letter}) {title}", loc="left", fontsize=10.5)
