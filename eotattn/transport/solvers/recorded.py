"""One piece of work again and again on a GPU: recorded as a graph, and stopped without waiting for the host."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

__all__ = ["repeat_while"]

#: For every thread and stream: the stream that its graphs are recorded on, and the graph that hands on its memory.
_LAST = threading.local()


def repeat_while(advance: Callable[[], None], running: Tensor, *, hands_on: bool) -> None:
    """Call ``advance`` until the flag that it updates is false, and once more, since the flag is read one call late."""
    with torch.cuda.device(running.device):  # whose streams and events are meant, whichever device is current outside
        _repeat_while(advance, running, hands_on)


def _repeat_while(advance: Callable[[], None], running: Tensor, hands_on: bool) -> None:
    advance()  # loads and tunes the kernels that the graph records
    if not bool(running):
        return
    replay = _recorded(advance, hands_on)
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


def _recorded(advance: Callable[[], None], hands_on: bool) -> Callable[[], None]:
    """The work as one graph, on a stream of its own while it is recorded.

    Memory for a graph is slow to get, so it is handed on. Graphs that share memory must not run at the same time: they
    share it only if they replay on the same stream, one after the other. A recording that fails may leave memory
    locked, so what it was given is not used again. The stream is kept: cuBLAS never gives back what it holds for one.
    """
    current = torch.cuda.current_stream()
    last: dict[torch.cuda.Stream, tuple[torch.cuda.Stream, torch.cuda.CUDAGraph | None]]
    last = vars(_LAST).setdefault("graphs", {})
    stream, before = last.pop(current) if current in last else (torch.cuda.Stream(), None)
    graph, memory = torch.cuda.CUDAGraph(), before.pool() if before is not None and hands_on else None
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        graph.capture_begin(memory, capture_error_mode="thread_local")
        try:
            advance()
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    last[current] = stream, graph if hands_on else before
    replay: Callable[[], None] = graph.replay
    return replay
