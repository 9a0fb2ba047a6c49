"""What the figures share: names of variants."""

from __future__ import annotations

__all__ = ["VARIANT_NAMES"]

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
