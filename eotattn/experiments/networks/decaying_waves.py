"""Waves whose amplitudes decay."""

from __future__ import annotations

from eotattn.priors import FourierPrior

__all__ = ["DecayingFourierPrior"]


class DecayingFourierPrior(FourierPrior):
    """A relative part whose amplitudes are pulled towards zero, as weights of matrices are.

    Waves that training does not need stay small, so that they cannot do harm at lags that training has not seen.
    Arguments are those of :class:`~eotattn.priors.FourierPrior`.

    Attributes:
        weight_decays: Says so to :func:`~eotattn.experiments.optimisation.parameter_groups`.

    Source:
        Original.

    Example:
        >>> DecayingFourierPrior(2, num_frequencies=4).weight_decays
        True
    """

    weight_decays = True
