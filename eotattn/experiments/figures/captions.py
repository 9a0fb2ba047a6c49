"""What the figures share: names of variants and titles of panels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["VARIANT_NAMES", "title_panels"]

#: Names in legends.
VARIANT_NAMES = {
    "rope": "RoPE",
    "interpolated_rope": "RoPE, interpolated",
    "ntk_rope": "RoPE, NTK",
    "alibi": "ALiBi",
    "goat": "GOAT",
    "paper_goat": "GOAT, paper's form",
    "fast_goat": "GOAT, fast prior",
    "fast_paper_goat": "paper's form, fast prior",
    "rotary_goat": "RoPE + GOAT",
    "local_rotary_goat": "GOAT, local heads rotary",
    "sinusoidal": "sinusoidal",
    "none": "no positions",
}


def title_panels(axes: Iterable[Axes], titles: tuple[str, ...]) -> None:
    """Give panels their letters and titles, in order."""
    for letter, panel, title in zip("abcdefgh", axes, titles, strict=False):
        panel.set_title(f"({letter}) {title}", loc="left", fontsize=10.5)
