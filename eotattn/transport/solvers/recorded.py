"""One piece of work again and again on a GPU: recorded as a graph, and stopped without waiting for the host."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

__all__ = ["repeat_while"]

#: The last graph of every thread and stream: the next one takes over its memory, and the stream it was recorded on.
_LAST = threading.local()


def repeat_while(advance: Callable[[], None], running: Tensor) -> None:
    """Call ``advance`` until the flag that it updates is false, and once more, since the flag is read one call late.

    Args:
        advance: Changes tensors in place, asks nothing of the host, and does nothing more once the flag is false.
        running: The flag, a boolean on a GPU, shape ().

    Source: original.
    """
    advance()  # loads and tunes the kernels that the graph records
    if not bool(running):
        return
    replay = _recorded(advance)
    flags = [torch.ones((), dtype=torch.bool, pin_memory=True) for _ in range(2)]
    events = [torch.cuda.Event() for _ in range(2)]
    for call in count():
        replay()
        flags[call % 2].copy_(running, non_blocking=True)
        events[call % 2].record()
        if call > 0:
            events[(call - 1) % 2].synchronize()
            if not bool(flags[(call - 1) % 2]):
                return


def _recorded(advance: Callable[[], None]) -> Callable[[], None]:
    """The work as one graph, on a stream of its own while it is recorded.

    Memory for a graph is slow to get, so it is handed on. Graphs that share memory must not run at the same time: they
    share it only if they replay on the same stream, one after the other.
    """
    current = torch.cuda.current_stream()
    last: dict[torch.cuda.Stream, tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]] = vars(_LAST).setdefault("graphs", {})
    before = last.get(current)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream() if before is None else before[1]
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        graph.capture_begin(None if before is None else before[0].pool(), capture_error_mode="thread_local")
        try:
            advance()
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    last[current] = graph, stream
    replay: Callable[[], None] = graph.replay
    return replay
