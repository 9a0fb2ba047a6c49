"""The sizes at which experiments can run."""

from __future__ import annotations

from collections.abc import Iterable

from eotattn.checks import check_choice

__all__ = ["ALL_SCALES", "SCALES", "check_scale"]

#: Scale of the paper's figures -> where it is meant to run.
SCALES = {
    "smoke": "seconds on one CPU core; shows that everything runs, not what comes out",
    "laptop": "minutes on two CPU cores; shows the phenomenon",
    "h200": "minutes on one H200 GPU; the numbers to quote",
    "paper": "the paper's own sizes; days on one H200 GPU",
}

#: The same and those of studies beyond the paper's.
ALL_SCALES = SCALES | {"gpu": "minutes a run on one H100 GPU, one run a GPU; the numbers to quote"}


def check_scale(owner: str, scale: str, scales: Iterable[str] = SCALES) -> str:
    """Return ``scale``, or raise unless it is one of ``scales``."""
    return check_choice(owner, "scale", scale, tuple(scales))
