"""The processes that a launcher started together, and what they agree on.

torchrun and accelerate tell each process its number by the variables ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``.
"""

from __future__ import annotations

import os
from typing import TypeVar

from torch import distributed

__all__ = ["agreed", "is_first_here", "is_first_process", "num_processes"]

Value = TypeVar("Value")


def num_processes() -> int:
    """How many processes were started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process writes and prints; true without a launcher."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def is_first_here() -> bool:
    """Whether this process speaks for those of its machine; true without a launcher."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def agreed(value: Value) -> Value:
    """What the first process has, in every process, so that all decide alike; ``value`` where there is one process.

    Args:
        value: Anything that can be pickled; all processes must call with one.
    """
    if num_processes() == 1 or not (distributed.is_available() and distributed.is_initialized()):
        return value
    shared = [value]
    distributed.broadcast_object_list(shared, src=0)
    return shared[0]
