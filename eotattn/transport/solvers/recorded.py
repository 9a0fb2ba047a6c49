"""One piece of work again and again on a GPU: recorded as a graph, and stopped without waiting for the host."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

__all__ = ["repeat_while"]

#: Calls before a graph pays; they also load and tune the kernels that it records.
_EAGER_CALLS = 3


def repeat_while(advance: Callable[[], None], running: Tensor) -> None:
    """Call ``advance`` until the flag that it updates is false, and once more, since the flag is read one call late.

    Args:
        advance: Changes tensors in place, asks nothing of the host, and does nothing more once the flag is false.
        running: The flag, a boolean on a GPU, shape ().

    Source: original.
    """
    for _ in range(_EAGER_CALLS):  # the host is the slower one here, so there is no reason to run ahead
        advance()
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
    """The work as one graph, on a stream of its own while it is recorded."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            advance()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    replay: Callable[[], None] = graph.replay
    return replay
