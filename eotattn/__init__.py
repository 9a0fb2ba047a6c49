"""eotattn: an entropic optimal transport analysis toolkit for attention."""
