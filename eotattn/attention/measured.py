"""What was measured: how backends compare, so that ``backend="auto"`` chooses by knowledge and can say why."""

from __future__ import annotations

from typing import NamedTuple

from eotattn.attention.masks import Masks

__all__ = ["MEASURED_WIDTH", "TIMES", "Times", "pattern_of", "preference"]

#: Width of the heads in these measurements; wider ones pay less for lanes, narrower ones more.
MEASURED_WIDTH = 64


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


#: By pattern and backend, the preferred first: bfloat16, 2 samples, 16 heads of width 64, 8192 tokens, one NVIDIA H200,
#: PyTorch 2.11; ``whole`` with a prior in lanes, a window of 256 tokens, five documents a sample. From
#: figures/h200/bench_attention.csv and bench_patterns.csv; a test compares. The faster comes first, but for
#: FlexAttention, which compiles for seconds at every new shape. What no table holds is ``None``, and its place in the
#: order an estimate. Calls with a prior were measured before lanes were built from terms.
TIMES: dict[str, dict[str, Times]] = {
    "whole": {
        "sdpa": Times(1.43, 1.55),
        "near_far": Times(None, None),
        "rebased": Times(None, None),
        "flex": Times(1.84, None),
        "varlen": Times(None, None),
        "reference": Times(None, None),
    },
    "window": {
        "varlen": Times(0.73, 0.75),
        "sdpa": Times(1.17, 1.00),
        "near_far": Times(None, None),
        "rebased": Times(None, None),
        "flex": Times(None, None),
        "reference": Times(None, None),
    },
    "window, prior": {
        "sdpa": Times(1.76, 1.28),
        "varlen": Times(4.01, 2.07),
        "near_far": Times(None, None),
        "rebased": Times(None, None),
        "flex": Times(None, None),
        "reference": Times(None, None),
    },
    "chunk": {
        "varlen": Times(None, None),
        "sdpa": Times(None, None),
        "near_far": Times(None, None),
        "rebased": Times(None, None),
        "flex": Times(None, None),
        "reference": Times(None, None),
    },
    "documents": {
        "varlen": Times(1.04, 0.87),
        "sdpa": Times(1.25, 1.12),
        "near_far": Times(None, None),
        "rebased": Times(None, None),
        "flex": Times(0.99, 0.75),
        "reference": Times(None, None),
    },
    "documents, prior": {
        "sdpa": Times(5.77, 3.69),
        "varlen": Times(8.20, 4.12),
        "near_far": Times(None, None),
        "rebased": Times(None, None),
        "flex": Times(None, None),
        "reference": Times(None, None),
    },
}


def pattern_of(masks: Masks, queries: int, *, has_prior: bool) -> str:
    """What queries see: the ``"whole"`` triangle or square, or a part that a kernel can skip the rest of.

    What a single query sees is a slice of the keys, and so the whole of them.
    """
    band = masks.band
    if queries == 1 or (masks.documents is None and (band is None or band.is_triangle)):
        return "whole"
    if masks.documents is None and band is not None and band.window is None:
        return "chunk"  # stock kernels need a mask for it, whatever the prior
    part = "window" if masks.documents is None else "documents"
    return f"{part}, prior" if has_prior else part


def preference(masks: Masks, queries: int, *, has_prior: bool) -> tuple[str, ...]:
    """Backends for calls with these masks, the preferred first."""
    return tuple(TIMES[pattern_of(masks, queries, has_prior=has_prior)])
