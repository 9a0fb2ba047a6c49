"""Intervals of means over sequences: 95% of the means of samples drawn with replacement.

Legend: N sequences, B resamples.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["mean_interval", "resamples"]

Array = NDArray[np.float64]


def resamples(count: int, num_bootstraps: int, generator: torch.Generator) -> Tensor:
    """(B, N) indices of N sequences, drawn with replacement."""
    return torch.randint(count, (num_bootstraps, count), generator=generator)


def mean_interval(values: Tensor, drawn: Tensor) -> tuple[Array, Array, Array]:
    """Mean of (N, H) over sequences and the ends of its interval, which is NaN below two sequences.

    Example:
        >>> mean, low, high = mean_interval(torch.tensor([[1.0], [3.0]]), torch.tensor([[0, 1], [1, 1], [0, 0]]))
        >>> float(mean[0]), bool(low[0] < mean[0] < high[0])
        (2.0, True)
    """
    mean = values.nanmean(0)
    if values.shape[0] < 2:
        nan = torch.full_like(mean, torch.nan)
        return mean.numpy(), nan.numpy(), nan.numpy()
    times = torch.zeros(drawn.shape[0], values.shape[0], dtype=values.dtype)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=values.dtype))  # how often each sequence was drawn
    known = ~values.isnan()
    resampled = (times @ torch.where(known, values, 0.0)) / (times @ known.to(values.dtype))
    low, high = torch.nanquantile(resampled, torch.tensor([0.025, 0.975], dtype=values.dtype), dim=0)
    return mean.numpy(), low.numpy(), high.numpy()
