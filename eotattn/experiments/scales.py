"""The sizes at which every experiment can run."""

from __future__ import annotations

from eotattn.checks import check_choice

__all__ = ["SCALES", "check_scale"]

#: Scale -> where it is meant to run.
SCALES = {
    "smoke": "seconds on one CPU core; shows that everything runs, not what comes out",
    "laptop": "minutes on two CPU cores; shows the phenomenon",
    "h200": "minutes on one H200 GPU; the numbers to quote",
    "paper": "the paper's own sizes; days on one H200 GPU",
}


def check_scale(owner: str, scale: str) -> str:
    """Return ``scale``, or raise unless it is one of :data:`SCALES`."""
    return check_choice(owner, "scale", scale, tuple(SCALES))
