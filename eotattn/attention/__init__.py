"""Attention with priors: the functional door, the module, rotary content."""

from eotattn.attention.functional import prior_attention
from eotattn.attention.module import GoatAttention, PriorAttention
from eotattn.attention.rotary import Rotary

__all__ = ["GoatAttention", "PriorAttention", "Rotary", "prior_attention"]
