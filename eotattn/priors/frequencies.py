"""Fixed geometric frequencies, and phases that stay exact at long positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["geometric_frequencies", "phases"]


def geometric_frequencies(
    count: int, min_period: float, max_period: float, device: torch.device | None = None
) -> Tensor:
    """Frequencies (R,) float64, radians a token, geometric from 2 pi / min_period down to 2 pi / max_period.

    Example:
        >>> (2 * math.pi / geometric_frequencies(3, 4.0, 64.0)).round().tolist()
        [4.0, 16.0, 64.0]
    """
    steps = torch.arange(count, dtype=torch.float64, device=device) / max(count - 1, 1)
    return 2 * math.pi / min_period * (min_period / max_period) ** steps


def phases(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * frequency, each (..., R), with the phase in float64.

    A float32 phase at position 131 072 is off by 5e-4 radians; a float64 one by 1e-11.
    """
    angle = positions.double().unsqueeze(-1) * frequencies.double()
    return angle.cos().to(dtype), angle.sin().to(dtype)
