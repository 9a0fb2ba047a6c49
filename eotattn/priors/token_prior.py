"""TokenPrior: a prior that leaves keys before the first token alone."""

from __future__ import annotations

import torch
from torch import Tensor

from eotattn.checks import require
from eotattn.priors.base import CombinedPrior, LogPrior, check_prior
from eotattn.priors.terms import KeyTerm, Term

__all__ = ["TokenPrior"]


class TokenPrior(CombinedPrior):
    """A prior of the tokens, zero at keys before the first token: sinks that it does not touch.

    Args:
        prior: Prior on a sequence; stays trainable.

    Example:
        >>> from eotattn.priors import RecencyPrior
        >>> TokenPrior(RecencyPrior(1)).dense(torch.tensor([9]), torch.tensor([-1, 9])).abs().max().item()
        0.0
    """

    def __init__(self, prior: LogPrior) -> None:
        check_prior("TokenPrior", "prior", prior)
        on_line = prior.num_coordinates == 1
        require(
            on_line, "TokenPrior", "prior", "lie on a sequence", type(prior).__name__, "Use ClassTokenPrior on grids"
        )
        super().__init__([prior], prior.num_heads)
        if self.has_lanes:
            self.terms()  # names its features before a graph is traced

    @property
    def prior(self) -> LogPrior:
        """The prior of the tokens."""
        return self.parts[0]

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The log-prior, in nats; zero before the first token."""
        value = self.prior.log_prior(head, query_position, key_position.clamp(min=0))
        return torch.where(key_position < 0, 0.0, value)

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """The terms without the keys before the first token."""
        return tuple([term.of_tokens() for term in self.prior.terms()])
