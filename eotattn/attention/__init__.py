"""Attention with priors: the functional door, the module, rotary content."""

from eotattn.attention.attention_sinks import AttentionSinks
from eotattn.attention.cache import KeyValueCache
from eotattn.attention.documents import PackedDocuments
from eotattn.attention.explanation import Explanation, explain
from eotattn.attention.functional import prior_attention
from eotattn.attention.layer.goat_attention import GoatAttention
from eotattn.attention.layer.prior_attention_layer import PriorAttention
from eotattn.attention.layer.rotary import Rotary
from eotattn.attention.merging import merge

__all__ = [
    "AttentionSinks",
    "Explanation",
    "GoatAttention",
    "KeyValueCache",
    "PackedDocuments",
    "PriorAttention",
    "Rotary",
    "explain",
    "merge",
    "prior_attention",
]
