"""Several processes share the texts of one analysis; what they find is put together as one process would find it.

Start them with ``torchrun --nproc-per-node N --no-python eotattn analyze ...``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from torch import distributed

from eotattn.processes import num_processes

__all__ = ["Shards", "merged", "shards"]

Part = TypeVar("Part")


@dataclass(frozen=True)
class Shards:
    """This process among those that share the work.

    Args:
        rank: Number of this process.
        count: Number of processes.
    """

    rank: int = 0
    count: int = 1

    def own(self, items: Sequence[Part]) -> list[tuple[int, Part]]:
        """This process's items with their places: every ``count``-th one."""
        return list(enumerate(items))[self.rank :: self.count]

    def gathered(self, found: dict[int, Part]) -> list[Part]:
        """What all processes found, in the order of places, the same in every process."""
        together: list[dict[int, Part] | None] = [found]
        if self.count > 1:
            together = [None] * self.count
            distributed.all_gather_object(together, found)
        merged = {place: part for shard in together for place, part in (shard or {}).items()}
        return [merged[place] for place in sorted(merged)]

    def device(self, name: str) -> str:
        """One GPU a process where ``name`` is "cuda"."""
        return f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}" if name == "cuda" and self.count > 1 else name


@contextmanager
def shards() -> Iterator[Shards]:
    """The processes of torchrun, joined for as long as the block runs; a single one without torchrun."""
    if not distributed.is_available() or (num_processes() == 1 and not distributed.is_initialized()):
        yield Shards()
        return
    joins = not distributed.is_initialized()
    if joins:
        distributed.init_process_group("gloo")
    try:
        yield Shards(distributed.get_rank(), distributed.get_world_size())
    finally:
        if joins:
            distributed.destroy_process_group()


def merged(parts: Sequence[Part]) -> Part:
    """The sum of the parts in their order, by halves: adding one after the other would copy the first again and again.

    Example:
        >>> merged(["a", "b", "c"])
        'abc'
    """
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    left, right = merged(parts[:half]), merged(parts[half:])
    return left + right  # type: ignore[operator]
