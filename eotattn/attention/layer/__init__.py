"""The layers: projections around the functional door, called like ``nn.MultiheadAttention``."""

from eotattn.attention.layer.goat_attention import GoatAttention
from eotattn.attention.layer.prior_attention_layer import PriorAttention
from eotattn.attention.layer.rotary import Rotary

__all__ = ["GoatAttention", "PriorAttention", "Rotary"]
