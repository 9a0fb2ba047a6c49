"""Which graph takes over whose memory, with CUDA's part played by stand-ins: no GPU is needed to see it."""

import contextlib
import threading
from typing import ClassVar

import pytest
import torch

from eotattn.transport.solvers import recorded


class Graph:
    """Records nothing; a failed end leaves its pool locked for good, as PyTorch's allocator does."""

    locked: ClassVar = set()

    def capture_begin(self, pool, capture_error_mode):
        self.given, self.own = pool, object() if pool is None else pool
        assert self.own not in Graph.locked, "beginAllocateToPool: already recording to mempool_id"
        Graph.locked.add(self.own)

    def capture_end(self):
        Graph.locked.discard(self.own)

    def pool(self):
        return self.own

    def replay(self):
        pass


class BrokenGraph(Graph):
    def capture_end(self):
        raise RuntimeError("operation failed due to a previous error during capture")


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def record(monkeypatch):
    """Record once, with a kind of graph; returns the pool that the graph was given."""
    current = Stream()
    monkeypatch.setattr(recorded, "_LAST", threading.local())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: streams.append(Stream()) or streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    made, streams = [], []

    def once(kind=Graph, **options):
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(kind()) or made[-1])
        recorded._recorded(lambda: None, **options)
        return made[-1].given, made[-1].own

    once.streams = streams
    return once


def test_memory_is_handed_on(record):
    given, own = record(hands_on=True)
    assert given is None
    assert record(hands_on=True) == (own, own)


def test_a_failed_recording_does_not_break_the_next(record):
    record(hands_on=True)
    with pytest.raises(RuntimeError, match="previous error"):
        record(BrokenGraph, hands_on=True)
    given, own = record(hands_on=True)
    assert given is None
    assert record(hands_on=True) == (own, own)


def test_memory_that_is_not_handed_on_is_neither_taken_nor_left(record):
    _, own = record(hands_on=True)
    given, other = record(hands_on=False)
    assert given is None
    assert record(hands_on=True) == (own, own)
    assert other is not own
    assert len(record.streams) == 1
