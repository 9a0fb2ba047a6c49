"""QueryGainPrior: a prior of positions that every query weighs by a factor of its own.

Legend: B batch, H heads, Q queries, K keys, E width of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.checks import check_positive_int, check_shape, require
from eotattn.priors.base import CombinedPrior, LogPrior, check_prior
from eotattn.priors.reading import Reading, Tokens
from eotattn.priors.terms import KeyTerm, Term

__all__ = ["QueryGainPrior", "gained"]


class QueryGainPrior(CombinedPrior):
    """A prior times a factor that the query's token decides: log_prior = gain(token i) prior(i, j), one gain a head.

    Of :class:`RecencyPrior` it makes a slope, of :class:`FourierPrior` an amplitude that depends on the text: the
    bilinear form with weights of the query's own, in the same lanes. gain = softplus(weight . token + ln(e - 1)) is
    never negative, and one at the start.

    It reads the tokens: :class:`~eotattn.attention.PriorAttention` calls :meth:`read_tokens` with its input. The forms
    of positions alone (``dense``, ``lanes``) have gain one.

    Args:
        prior: Bilinear prior on a sequence; stays trainable.
        embed_dim: Width E of the tokens.

    Attributes:
        weight: (H, E), zero at the start.

    Source:
        The bilinear form of Litman and Guo 2026 (arXiv 2601.15380), section 3, with weights that depend on the token.

    Example:
        >>> from eotattn.priors import RecencyPrior
        >>> prior, tokens = QueryGainPrior(RecencyPrior(2), embed_dim=8), torch.ones(1, 3, 8)
        >>> prior.read_tokens(Tokens(tokens, tokens)).query_gains[0].shape
        torch.Size([1, 2, 3])
    """

    def __init__(self, prior: LogPrior, embed_dim: int) -> None:
        owner = "QueryGainPrior"
        check_prior(owner, "prior", prior)
        is_bilinear = prior.has_lanes and all(isinstance(term, Term) for term in prior.terms())
        rule, remedy = "have bilinear terms and read positions alone", "Apply it to RecencyPrior or FourierPrior"
        fits = is_bilinear and not prior.reads_tokens
        require(fits, owner, "prior", rule, type(prior).__name__, remedy)
        super().__init__([prior], prior.num_heads)
        self.embed_dim = check_positive_int(owner, "embed_dim", embed_dim)
        self.weight = nn.Parameter(torch.empty(prior.num_heads, embed_dim, dtype=torch.float32))
        nn.init.zeros_(self.weight)

    @property
    def prior(self) -> LogPrior:
        """The prior that is weighed."""
        return self.parts[0]

    @property
    def reads_tokens(self) -> bool:
        """It does."""
        return True

    def reset_parameters(self) -> None:
        """Reset the prior, and gains to one."""
        super().reset_parameters()
        nn.init.zeros_(self.weight)

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The log-prior at gain one, in nats."""
        return self.prior.log_prior(head, query_position, key_position)

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """The terms at gain one."""
        return self.prior.terms()

    def read_tokens(self, tokens: Tokens) -> Reading:
        """The gains of the queries' tokens."""
        check_shape("QueryGainPrior", "tokens", tokens.query, (None, None, self.embed_dim), "Build it for this width")
        logits = functional.linear(tokens.query, self.weight.to(tokens.query.dtype))  # as content is projected
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) + math.log(math.expm1(1.0))
        gain = -functional.logsigmoid(-wide).transpose(1, 2)  # softplus, whose gradient graphs lay out otherwise
        return Reading(query_gains=(gain,) * len(self.terms()))


def gained(
    terms: Sequence[Term | KeyTerm], gains: Sequence[Tensor | None], query_positions: Tensor, key_positions: Tensor
) -> Tensor:
    """What gains (B, H, Q) add to a log-prior whose terms are at gain one: (B, H, Q, K) float64, nats."""
    added = []
    for term, gain in zip(terms, gains, strict=True):
        if gain is not None and isinstance(term, Term):
            query, key = term.sides(query_positions.double(), key_positions.double())
            key = key.unsqueeze(-3)
            added.append((gain.double() - 1).unsqueeze(-1) * (query @ key.mT))
    return torch.stack(added).sum(0)
