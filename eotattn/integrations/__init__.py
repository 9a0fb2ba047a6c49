"""Integrations: attach to models of other libraries. Importing this room imports none of them."""

from eotattn.integrations.capture import Capture, capture

__all__ = ["Capture", "capture"]
