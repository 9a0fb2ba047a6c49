"""Attention kernels: one file a backend, tensors in and tensors out; each says what it can do."""

from eotattn.kernels import flex, reference, sdpa

__all__ = ["flex", "reference", "sdpa"]
