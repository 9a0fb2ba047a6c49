"""Integrations: attach to models of other libraries. Importing this room imports none of them."""

from eotattn.integrations.capture import Capture, capture
from eotattn.integrations.maps import map_statistics, read_maps
from eotattn.integrations.training_probe import TrainingProbe

__all__ = ["Capture", "TrainingProbe", "capture", "map_statistics", "read_maps"]
