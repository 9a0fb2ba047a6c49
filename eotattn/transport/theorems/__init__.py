"""The theorems of the papers as functions: each returns both sides of its statement, and the slack between them."""

from eotattn.transport.theorems.collapse import collapse_to_the_prior
from eotattn.transport.theorems.comparison import Comparison
from eotattn.transport.theorems.gradient import advantage_identity, fisher_identity
from eotattn.transport.theorems.key_only import key_only_minimality
from eotattn.transport.theorems.recency_entropy import geometric_log_prior, maximum_entropy_recency
from eotattn.transport.theorems.sink_margin import SinkMargin, context_sensitivity, sink_margin, value_perturbation
from eotattn.transport.theorems.trigonometric import TrigonometricFactors, trigonometric_factors

__all__ = [
    "Comparison",
    "SinkMargin",
    "TrigonometricFactors",
    "advantage_identity",
    "collapse_to_the_prior",
    "context_sensitivity",
    "fisher_identity",
    "geometric_log_prior",
    "key_only_minimality",
    "maximum_entropy_recency",
    "sink_margin",
    "trigonometric_factors",
    "value_perturbation",
]
