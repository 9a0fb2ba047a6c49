"""TransposedPrior: a prior with queries and keys exchanged, so that a prior of keys is one of queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from eotattn.checks import require
from eotattn.priors.base import CombinedPrior, LogPrior, check_prior
from eotattn.priors.terms import FEATURES, Entry, Features, KeyTerm, Term

__all__ = ["TransposedPrior"]


class TransposedPrior(CombinedPrior):
    """The log-prior with queries and keys exchanged: log_prior(i, j) = prior(j, i).

    Of a prior of keys, such as :class:`SinkPrior`, it makes one of queries: a constant of each row. Softmax does not
    see it, so attention is the same with any; a two-sided transport problem and an explicit sink do see it.

    Args:
        prior: The prior to transpose; stays trainable. It may not read the tokens.

    Example:
        >>> import torch
        >>> from eotattn.priors import SinkPrior
        >>> sink = SinkPrior(1, num_frequencies=0)
        >>> _ = torch.nn.init.ones_(sink.first_token)
        >>> TransposedPrior(sink).dense(torch.arange(2), torch.arange(3)).tolist()
        [[[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]]
    """

    def __init__(self, prior: LogPrior) -> None:
        check_prior("TransposedPrior", "prior", prior)
        rule, remedy = "read positions alone", "Transpose the parts that do"
        require(not prior.reads_tokens, "TransposedPrior", "prior", rule, type(prior).__name__, remedy)
        super().__init__([prior], prior.num_heads)
        self._name_features()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._name_features()

    def _name_features(self) -> None:
        """Before a graph is traced, which cannot."""
        if self.has_lanes:
            self.terms()

    @property
    def prior(self) -> LogPrior:
        """The prior that is transposed."""
        return self.parts[0]

    @property
    def has_lanes(self) -> bool:
        """Whether the prior has lanes, none of which is looked up by key."""
        return self.prior.has_lanes and all(isinstance(term, Term) for term in self.prior.terms())

    def check_positions(self, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
        """Raise unless the prior understands both, exchanged."""
        LogPrior.check_positions(self, query_positions, key_positions)
        self.prior.check_positions(key_positions, query_positions)

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The log-prior of the exchanged pair, in nats."""
        return self.prior.log_prior(head, key_position, query_position)

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """The terms with their features exchanged."""
        return tuple([_transposed(term) for term in self.prior.terms() if isinstance(term, Term)])


def _transposed(term: Term) -> Term:
    features = term.features
    name = f"{features.name}[transposed]"
    if name not in FEATURES:
        entries: tuple[Entry, ...] = tuple([(n, key, query, sign) for n, query, key, sign in features.entries])
        FEATURES[name] = Features(
            name,
            features.key,
            features.query,
            entries=entries,
            num_features=features.num_features[::-1],
            is_relative=features.is_relative,
            typical_range=features.typical_range,
        )
    return replace(term, features=FEATURES[name])
