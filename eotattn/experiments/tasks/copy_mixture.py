"""The copy mixture: data whose best attention is a prior, because content cannot help.

Legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eotattn.checks import check_positive, check_positive_int, require
from eotattn.experiments.tasks.batches import Batch, step_generator

__all__ = ["CopyMixture"]


@dataclass(frozen=True)
class CopyMixture:
    """Each token copies the first token, copies the previous token, or is noise, independently at every position.

    x_0 is uniform; for t >= 1, x_t = x_0 with probability ``first_probability``, x_t = x_{t-1} with probability
    ``previous_probability``, else uniform over the vocabulary. Which of the three happened is not visible, so the best
    attention of the query that predicts x_t depends on positions alone: it looks at key 0 and at key t - 1.
    A query i sees x_0 ... x_i and predicts x_{i+1}; the lag to key j is counted from the *predicted* token, i + 1 - j.

    Args:
        vocabulary_size: Number of tokens V, at least 2.
        length: Tokens L that the model sees, at least 2.
        first_probability: Probability of copying the first token, in [0, 1].
        previous_probability: Probability of copying the previous token; at most one together with the other.

    Source:
        The generator of figure 1 in Litman and Guo 2026 (arXiv 2601.15380), restated; sizes and probabilities are ours.

    Example:
        >>> task = CopyMixture(vocabulary_size=8, length=6, first_probability=0.5, previous_probability=0.5)
        >>> task.batch(4, seed=0, step=0).inputs.shape
        torch.Size([4, 6])
    """

    vocabulary_size: int = 16
    length: int = 32
    first_probability: float = 0.4
    previous_probability: float = 0.4

    def __post_init__(self) -> None:
        check_positive_int("CopyMixture", "vocabulary_size", self.vocabulary_size, minimum=2)
        check_positive_int("CopyMixture", "length", self.length, minimum=2)
        for name in ("first_probability", "previous_probability"):
            check_positive("CopyMixture", name, getattr(self, name), allow_zero=True)
        copied = self.first_probability + self.previous_probability
        remedy = "Lower first_probability or previous_probability"
        require(copied <= 1, "CopyMixture", "the sum of both probabilities", "be at most 1", copied, remedy)

    @property
    def noise_probability(self) -> float:
        """Probability that a token is drawn uniformly."""
        return 1.0 - self.first_probability - self.previous_probability

    def batch(self, batch_size: int, *, seed: int, step: int) -> Batch:
        """Draw sequences.

        Returns:
            A :class:`Batch` of (B, L) tokens and their successors.
        """
        generator = step_generator(seed, step)
        shape = (batch_size, self.length + 1)
        tokens = torch.randint(self.vocabulary_size, shape, generator=generator)
        choice = torch.rand(shape, generator=generator, dtype=torch.float64)
        copies_first = choice < self.first_probability
        copies_previous = ~copies_first & (choice < self.first_probability + self.previous_probability)
        for t in range(1, self.length + 1):
            tokens[:, t] = torch.where(copies_first[:, t], tokens[:, 0], tokens[:, t])
            tokens[:, t] = torch.where(copies_previous[:, t], tokens[:, t - 1], tokens[:, t])
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def ideal_attention(self) -> Tensor:
        """The attention that reads the copied token with the right odds.

        Returns:
            (L, L) float64, rows sum to one: row i has ``first_probability`` on key 0 and ``previous_probability`` on
            key i (lag one from the predicted token), normalised.
        """
        weights = torch.zeros(self.length, self.length, dtype=torch.float64)
        weights[:, 0] += self.first_probability
        weights += self.previous_probability * torch.eye(self.length, dtype=torch.float64)
        return weights / weights.sum(-1, keepdim=True)

    def ideal_log_prior(self, *, floor: float = 1e-3) -> Tensor:
        """log(ideal_attention + floor), with -inf where the causal mask forbids a key.

        Returns:
            (L, L) float64, nats, not normalised.
        """
        log_prior = (self.ideal_attention() + floor).log()
        future = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        return log_prior.masked_fill(future, -math.inf)

    def best_loss(self, batch: Batch) -> float:
        """Mean negative log-likelihood of the generator itself on ``batch``, nats a token: no model does better."""
        first, previous, target = batch.inputs[:, :1], batch.inputs, batch.targets
        probability = torch.full(target.shape, self.noise_probability / self.vocabulary_size, dtype=torch.float64)
        probability += self.first_probability * (target == first)
        probability += self.previous_probability * (target == previous)
        return float(-probability.log().mean())
