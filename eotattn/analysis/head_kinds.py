"""What kind of head each one is: what it attends to on most texts.

Legend: A layers, H heads, N texts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eotattn.analysis.summary import Summary
from eotattn.diagnostics.strongest_keys import uniform_share

__all__ = ["KINDS", "MOSTLY", "POSITION_ALONE", "head_kinds", "kind_grid", "tellable"]

#: Share of attention above which a head attends mostly to something; that of the sink rate (Gu et al. 2024).
MOSTLY = 0.3
#: Share of held-out divergence above which position alone makes a head.
POSITION_ALONE = 0.8

#: Kind -> the quantity that says it, where it is one score; the order of filters.
KINDS: dict[str, str] = {
    "sink on the first token": "mass of the strongest key",
    "sink on another token": "mass of the strongest key",
    "previous token": "previous-token score",
    "induction": "induction score",
    "duplicate token": "duplicate-token score",
    "position alone": "explained by position",
    "dormant": "dormant",
}


def tellable(summary: Summary) -> NDArray[np.bool_]:
    """(N,) whether a text is long enough to tell a sink: uniform attention would give its first token less."""
    shares = [uniform_share(stats).numpy() for stats in summary.statistics.values()]
    longest = max(map(len, shares))
    return np.max([np.pad(share, (0, longest - len(share))) for share in shares], axis=0) < MOSTLY


def kind_grid(summary: Summary, kind: str) -> NDArray[np.bool_]:
    """(A, H) whether each head is of a kind of :data:`KINDS`."""
    mean = summary.heads.mean
    if kind.startswith("sink"):
        first, other = _sinks(summary)
        return first if kind == "sink on the first token" else other
    if kind == "position alone":
        return ~summary.fails() & (np.nan_to_num(summary.explained()) > POSITION_ALONE) & (not summary.is_in_sample)
    grid = mean.get(KINDS[kind], np.full_like(mean["entropy"], np.nan))
    if kind == "dormant":
        return np.nan_to_num(grid) > 0.5
    return (np.nan_to_num(grid) > MOSTLY) & tellable(summary).any()


def head_kinds(summary: Summary) -> list[list[tuple[str, ...]]]:
    """A lists of H tuples of kinds; a head may have several or none."""
    grids = {kind: kind_grid(summary, kind) for kind in KINDS}
    layers, heads = summary.heads.mean["entropy"].shape
    return [[tuple(kind for kind, grid in grids.items() if grid[a, h]) for h in range(heads)] for a in range(layers)]


def _sinks(summary: Summary) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(A, H) heads whose strongest key is a sink in most texts: on the first token in most of those, or elsewhere."""
    first = np.zeros(summary.heads.mean["entropy"].shape, dtype=bool)
    other, told = first.copy(), tellable(summary)
    for a, (mass, position) in enumerate(zip(summary.strongest.mass, summary.strongest.position, strict=True)):
        told_here = told[: len(mass)]
        if not told_here.any():
            continue
        sinks = mass[told_here] > MOSTLY
        on_first = (sinks & (position[told_here] == 0)).sum(0) > sinks.sum(0) / 2
        is_sink = sinks.mean(0) > 0.5
        first[a, : len(is_sink)], other[a, : len(is_sink)] = is_sink & on_first, is_sink & ~on_first
    return first, other
