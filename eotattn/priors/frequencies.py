"""Fixed geometric frequencies, and phases that stay exact at long positions."""

from __future__ import annotations

import math

from torch import Tensor

from eotattn.priors.positions import constants

__all__ = ["geometric_frequencies", "phases"]


def geometric_frequencies(count: int, min_period: float, max_period: float) -> tuple[float, ...]:
    """Frequencies, radians a token, geometric from 2 pi / min_period down to 2 pi / max_period.

    Example:
        >>> [round(2 * math.pi / frequency) for frequency in geometric_frequencies(3, 4.0, 64.0)]
        [4, 16, 64]
    """
    ratio = min_period / max_period
    return tuple(2 * math.pi / min_period * ratio ** (r / max(count - 1, 1)) for r in range(count))


def phases(positions: Tensor, frequencies: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * frequency, each (..., R) float64.

    A float32 phase at position 131 072 is off by 5e-4 radians; a float64 one by 1e-11.
    """
    angle = positions.double().unsqueeze(-1) * constants(frequencies, positions.device)
    return angle.cos(), angle.sin()
