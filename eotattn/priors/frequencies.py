"""Fixed geometric frequencies, and phases that stay exact at long positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["fill_geometric", "phases"]


def fill_geometric(frequencies: Tensor, min_period: float, max_period: float) -> None:
    """Fill ``frequencies`` (R,), radians a token, geometrically from 2 pi / min_period down to 2 pi / max_period.

    Example:
        >>> frequencies = torch.empty(3, dtype=torch.float64)
        >>> fill_geometric(frequencies, 4.0, 64.0)
        >>> (2 * math.pi / frequencies).round().tolist()
        [4.0, 16.0, 64.0]
    """
    count = frequencies.shape[0]
    steps = torch.arange(count, dtype=torch.float64, device=frequencies.device) / max(count - 1, 1)
    with torch.no_grad():
        frequencies.copy_(2 * math.pi / min_period * (min_period / max_period) ** steps)


def phases(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * frequency, each (..., R), with the phase in float64.

    A float32 phase at position 131 072 is off by 5e-4 radians; a float64 one by 1e-11.
    """
    angle = positions.double().unsqueeze(-1) * frequencies.double()
    return angle.cos().to(dtype), angle.sin().to(dtype)
