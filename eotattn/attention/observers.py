"""Observers of attention calls: who listens in is told of every call after it was served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from eotattn.attention.backends import Backend
from eotattn.attention.call import AttentionCall

__all__ = ["OBSERVERS", "Observer", "observe"]

#: Told of (call, backend, output) after every call of :func:`prior_attention`.
Observer = Callable[[AttentionCall, Backend, Tensor], None]

OBSERVERS: list[Observer] = []


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Tell ``observer`` of every :func:`prior_attention` call inside the ``with`` block.

    Example:
        >>> import torch
        >>> from eotattn import prior_attention
        >>> x, seen = torch.ones(1, 2, 3, 4), []
        >>> with observe(lambda call, backend, output: seen.append(backend.name)):
        ...     _ = prior_attention(x, x, x)
        >>> seen
        ['sdpa']
    """
    OBSERVERS.append(observer)
    try:
        yield
    finally:
        OBSERVERS.remove(observer)
