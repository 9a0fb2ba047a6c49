"""What was measured: how backends compare, so that ``backend="auto"`` chooses by knowledge and can say why."""

from __future__ import annotations

from typing import NamedTuple

from eotattn.attention.masks import Masks

__all__ = ["TIMES", "Times", "pattern_of", "preference"]


class Times(NamedTuple):
    """Median time over that of plain causal attention by PyTorch's default kernel, on the whole triangle.

    Args:
        forward: Of the forward pass; ``None`` where it was not measured.
        both: Of forward and backward; ``None`` where it cannot run or was not measured.
    """

    forward: float | None
    both: float | None

    def __str__(self) -> str:
        known = [f"{time:.2f}x {name}" for name, time in (("forward", self.forward), ("both ways", self.both)) if time]
        return ", ".join(known) or "not measured"


#: By pattern and backend, the fastest first: priors with lanes, bfloat16, 2 samples, 16 heads of width 64, 8192 tokens,
#: one NVIDIA H200, PyTorch 2.11; ``part`` is five documents a sample. From figures/h200/bench_attention.csv and
#: bench_patterns.csv; a test compares. What no table holds is ``None``, and its place in the order an estimate.
TIMES: dict[str, dict[str, Times]] = {
    "whole": {
        "sdpa": Times(1.43, 1.55),
        "flex": Times(1.84, None),
        "varlen": Times(None, None),
        "reference": Times(None, None),
    },
    "part": {
        "varlen": Times(None, None),
        "sdpa": Times(None, None),
        "flex": Times(None, None),
        "reference": Times(None, None),
    },
}


def pattern_of(masks: Masks, queries: int) -> str:
    """Whether queries see the ``"whole"`` triangle or square, or a ``"part"`` that a kernel can skip the rest of.

    What a single query sees is a slice of the keys, and so the whole of them.
    """
    is_part = masks.documents is not None or (masks.band is not None and not masks.band.is_triangle)
    return "part" if is_part and queries > 1 else "whole"


def preference(masks: Masks, queries: int) -> tuple[str, ...]:
    """Backends for calls with these masks, the fastest first."""
    return tuple(TIMES[pattern_of(masks, queries)])
