"""The GOAT prior, in the form that extrapolates and in the paper's own."""

from __future__ import annotations

import math

from eotattn.checks import check_choice, check_positive, check_positive_int, speaking_as
from eotattn.priors.base import LogPrior, SumPrior
from eotattn.priors.fourier import FourierPrior
from eotattn.priors.recency import RecencyPrior
from eotattn.priors.sink import SinkPrior

__all__ = ["goat_prior", "num_local_heads"]


#: Mean lag of a global head in training lengths: over sixteen of them it forgets a quarter of a nat.
GLOBAL_REACH = 64.0


def num_local_heads(num_heads: int) -> int:
    """How many heads of ``goat_prior(num_heads)`` are local; they come first, the global ones last.

    Example:
        >>> [num_local_heads(num_heads) for num_heads in (1, 2, 4, 8, 12)]
        [1, 1, 3, 6, 9]
    """
    check_positive_int("num_local_heads", "num_heads", num_heads)
    return num_heads - (max(1, num_heads // 4) if num_heads > 1 else 0)


@speaking_as("goat_prior")
def goat_prior(
    num_heads: int,
    *,
    form: str = "split",
    num_frequencies: int = 8,
    min_period: float | None = None,
    max_period: float | None = None,
    num_key_frequencies: int | None = None,
    length_scale: float = 2048.0,
    init: str = "alibi",
) -> SumPrior:
    """The GOAT log-prior: K_ij = kappa(i - j) + u(j) with a recency slope, the sum of three priors.

    In the form ``"split"`` three quarters of the heads are *local*: their mean lags run from 2 tokens to half of
    ``length_scale``, and their waves repeat within a quarter of it, so that training shows every lag that matters. The
    others are *global*: their mean lag is 64 times ``length_scale`` and their waves are as much weaker, so that content
    alone decides, there and at contexts many times longer. u(j) is constant from ``length_scale`` on. In the paper's
    form, ``"paper"``, every head has an ALiBi slope whatever the training length, waves of up to 62 832 tokens, and a
    u(j) that goes on bending; it extrapolates on language, and forgets what lies many training lengths back.

    Args:
        num_heads: Number of query heads H.
        form: ``"split"`` or ``"paper"``.
        num_frequencies: Frequencies R of the relative part.
        min_period: Shortest period of the relative part, tokens; by default 2.5, or the paper's 2 pi.
        max_period: Longest period, tokens; by default a quarter of ``length_scale``, or the paper's base 10 000.
        num_key_frequencies: Wave frequencies of u(j); by default none, or four in the paper's form.
        length_scale: The training length, tokens.
        init: ``"alibi"`` starts at the slopes of the form, ``"neutral"`` at exactly zero; all the rest starts at zero.

    Returns:
        A :class:`SumPrior` of relative waves, :class:`RecencyPrior` and :class:`SinkPrior`, in this order. In float32
        it occupies 2 R + 3 lanes, in bfloat16 and float16 2 R + 7.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), section 3; the form ``"split"`` was chosen by the experiments of
        ``notebooks/ablations.ipynb``.

    Example:
        >>> [goat_prior(4, num_frequencies=4).num_lanes(dtype) for dtype in (torch.float32, torch.bfloat16)]
        [11, 15]
    """
    check_choice("goat_prior", "form", form, ("split", "paper"))
    scale = check_positive("goat_prior", "length_scale", length_scale)
    if form == "paper":
        shortest, longest = _or(min_period, 2 * math.pi), _or(max_period, 2 * math.pi * 10_000)
        waves: LogPrior = FourierPrior(num_heads, num_frequencies, shortest, longest)
        sink = SinkPrior(num_heads, 4 if num_key_frequencies is None else num_key_frequencies, scale)
        return SumPrior(waves, RecencyPrior(num_heads, init), sink)
    lags = _split_mean_lags(num_heads, scale)
    shortest = _or(min_period, 2.5)
    waves = FourierPrior(num_heads, num_frequencies, shortest, _or(max_period, max(shortest, scale / 4)))
    weaker = [min(1.0, scale / (2 * lag)) for lag in lags]
    sink = SinkPrior(num_heads, num_key_frequencies or 0, scale, horizon=scale)
    return SumPrior(waves * weaker, RecencyPrior(num_heads, init, lags), sink)


def _or(given: float | None, default: float) -> float:
    """What was given, be it zero, or the default."""
    return default if given is None else given


def _split_mean_lags(num_heads: int, length_scale: float) -> list[float]:
    """Mean lags of local heads, geometric from 2 tokens to half of the length scale, then those of global heads."""
    local = num_local_heads(num_heads)
    shortest, longest = 2.0, max(2.0, length_scale / 2)
    lags = [longest * (shortest / longest) ** (k / max(1, local - 1)) for k in reversed(range(local))]
    return lags + [GLOBAL_REACH * max(1.0, length_scale)] * (num_heads - local)
