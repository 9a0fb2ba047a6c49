"""Decoding steps are timed within their slots, and a recorded one keeps what it reads."""

import gc
import importlib
import weakref

import pytest
import torch

from eotattn.benchmarks.suites.configuration import configure
from eotattn.benchmarks.suites.inputs import gpt_prior, trained

suite = importlib.import_module("eotattn.benchmarks.suites.decode")  # the package's attribute is the function
SMALL, SHAPE = configure("cpu", "float32", "small", rounds=1), (1, 4, 2, 64, 32)
ARMS = {
    "bare": lambda kind: suite._bare(SMALL, SHAPE, kind),
    "masked": lambda kind: suite._bare(SMALL, SHAPE, kind, 0, 0, True),
    "cached": lambda kind: suite._cached(SMALL, SHAPE, kind, 0, trained(gpt_prior(4), SMALL)),
}


@pytest.fixture
def played(monkeypatch):
    """Records a step as a graph is: run three times, then known by its addresses alone."""

    def recorded(step):
        for _ in range(3):
            step()
        alone = weakref.ref(step)
        return lambda: alone()()

    monkeypatch.setattr(suite, "_recorded", recorded)
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)


@pytest.mark.parametrize("arm", ARMS)
def test_a_recorded_step_keeps_what_it_reads(arm, played, monkeypatch):
    made, sides = [], suite._sides
    monkeypatch.setattr(suite, "_sides", lambda *of: made.append(sides(*of)) or made[-1])
    with torch.no_grad():
        step = suite._stepping("recorded", SHAPE, *ARMS[arm]("recorded"))
    read = [weakref.ref(side) for side in made.pop()[: 1 if arm == "cached" else 3]]
    gc.collect()
    assert all(side() is not None for side in read)
    del step
    gc.collect()
    assert all(side() is None for side in read)


@pytest.mark.parametrize("kind", ["eager", "compiled", "recorded"])
@pytest.mark.parametrize("arm", ARMS)
def test_steps_stay_within_the_slots(arm, kind, played):
    """A slot beyond the last raises on a CPU; the cache is full after a quarter of its slots, and begins again."""
    with torch.no_grad():
        attend, rewind = ARMS[arm](kind)
        since = most = 0

        def counted():
            nonlocal since, most
            since += 1
            most = max(most, since)
            return attend()

        def to_start():
            nonlocal since
            since = 0
            rewind()

        step = suite._stepping(kind, SHAPE, counted, to_start)
        if kind == "recorded":
            step.run = counted
        for _ in range(3 * 16 + 1):
            step()
    assert most == 16
    assert since == 1
