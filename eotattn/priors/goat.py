"""The paper's prior, by name."""

from __future__ import annotations

import math

from eotattn.priors.base import SumPrior
from eotattn.priors.fourier import FourierPrior
from eotattn.priors.recency import RecencyPrior
from eotattn.priors.sink import SinkPrior

__all__ = ["goat_prior"]


def goat_prior(
    num_heads: int,
    *,
    num_frequencies: int = 8,
    min_period: float = 2 * math.pi,
    max_period: float = 2 * math.pi * 10_000,
    num_key_frequencies: int = 4,
    length_scale: float = 2048.0,
    init: str = "alibi",
) -> SumPrior:
    """The GOAT log-prior: K_ij = kappa(i - j) + u(j) with a recency slope, the sum of three priors.

    Args:
        num_heads: Number of query heads H.
        num_frequencies: Frequencies R of the relative part.
        min_period: Shortest period of the relative part, tokens; the default is angular frequency 1, as in the paper.
        max_period: Longest period, tokens; the default is the paper's base 10 000.
        num_key_frequencies: Wave frequencies of u(j).
        length_scale: Tokens over which u(j) varies; the paper's is its training length.
        init: ``"alibi"`` starts at ALiBi's slopes, ``"neutral"`` at exactly zero; all the rest starts at zero.

    Returns:
        A :class:`SumPrior` whose ``parts`` are the :class:`FourierPrior`, :class:`RecencyPrior` and :class:`SinkPrior`.
        In float32 it occupies 2 R + 2 lanes.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), section 3.

    Example:
        >>> goat_prior(4, num_frequencies=3).num_lanes()
        8
    """
    return SumPrior(
        FourierPrior(num_heads, num_frequencies, min_period, max_period),
        RecencyPrior(num_heads, init),
        SinkPrior(num_heads, num_key_frequencies, length_scale),
    )
