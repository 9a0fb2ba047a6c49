"""Figures as bytes."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["to_png"]


def to_png(axes: Axes, *, dots_per_inch: int = 110) -> bytes:
    """Return the figure of ``axes`` as a PNG file without dates inside, and close it."""
    figure, content = axes.get_figure(root=True), io.BytesIO()
    assert isinstance(figure, Figure)
    figure.savefig(content, format="png", dpi=dots_per_inch, metadata={"Software": None})
    plt.close(figure)
    return content.getvalue()
