"""The layers: projections around the functional door, called like ``nn.MultiheadAttention``."""

from eotattn.attention.layer.goat import GoatAttention
from eotattn.attention.layer.module import PriorAttention
from eotattn.attention.layer.rotary import Rotary

__all__ = ["GoatAttention", "PriorAttention", "Rotary"]
