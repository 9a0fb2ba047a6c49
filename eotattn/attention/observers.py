"""Observers of attention calls: who listens in stands around every call while it is served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from eotattn.attention.backends import Backend, Served, answer
from eotattn.attention.call import AttentionCall

__all__ = ["OBSERVERS", "Observer", "Served", "observe", "serve"]

#: Given (call, backend, serve), it returns what ``serve()`` returned.
Observer = Callable[[AttentionCall, Backend, Callable[[], Served]], Served]

OBSERVERS: list[Observer] = []


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Let ``observer`` stand around every :func:`prior_attention` call inside the ``with`` block.

    Example:
        >>> import torch
        >>> from eotattn import prior_attention
        >>> x, seen = torch.ones(1, 2, 3, 4), []
        >>> with observe(lambda call, backend, serve: seen.append(backend.name) or serve()):
        ...     _ = prior_attention(x, x, x)
        >>> seen
        ['sdpa']
    """
    OBSERVERS.append(observer)
    try:
        yield
    finally:
        OBSERVERS.remove(observer)


def serve(call: AttentionCall, backend: Backend) -> Served:
    """Let ``backend`` serve the call, with every observer around it."""
    if not OBSERVERS:
        return answer(call, backend)
    served = partial(answer, call, backend)
    for observer in OBSERVERS:
        served = partial(observer, call, backend, served)
    return served()
