"""Timing: all candidates in turn, many rounds, medians with their spread.

On a GPU one sample is a few calls in a row between two events, as in training, where the host runs ahead: the larger of
the host's time and the device's counts, not their sum.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Candidate", "Row", "measure", "reason"]

Row = dict[str, Any]

#: Calls in a row in one sample, on a GPU.
CALLS = 5
#: Seconds that one candidate's samples take at most, about; a slow one is called fewer times, and three times at least.
SECONDS = 3.0


@dataclass(frozen=True)
class Candidate:
    """One thing to time.

    Args:
        name: What it is, for the table.
        make: Builds the function to time; its cost (weights, compilation) is not timed. An exception here or in the
            first call becomes a row that says why.
        error: Computes the error against float64, if there is one to compare.
    """

    name: str
    make: Callable[[], Callable[[], Any]]
    error: Callable[[], float] | None = None


@dataclass
class _Ready:
    candidate: Candidate
    run: Callable[[], Any]
    peak_mib: float | None
    seconds: float
    times: list[float]

    def sample(self, device: torch.device, rounds: int, calls: int) -> None:
        """Time some calls in a row, unless there were enough."""
        calls = calls if self.seconds * calls * rounds <= SECONDS else 1
        if len(self.times) < 3 or self.seconds * len(self.times) <= SECONDS:
            self.times.append(_time_once(self.run, device, calls))


def measure(
    candidates: Sequence[Candidate], *, device: torch.device, rounds: int = 20, warmup: int = 3, calls: int = CALLS
) -> list[Row]:
    """Time the candidates in turn, in every round; the first is the baseline.

    Args:
        candidates: What to time.
        device: CUDA events are used on a GPU, the host's clock elsewhere.
        rounds: Timed samples of each candidate; fewer where they would take more than :data:`SECONDS`.
        warmup: Calls of each before the first that counts.
        calls: Calls in a row in one sample, on a GPU; fewer where a call is long.

    Returns:
        One row a candidate: ``name``, ``median_ms`` of a call, ``low_ms`` and ``high_ms`` (quartiles), ``ratio`` to the
        baseline's median, ``peak_mib`` above what was allocated before the call and its ``peak_ratio`` to the
        baseline's, ``error``, ``failure``. Where a candidate takes the device down, the others keep their samples.
    """
    ready: list[_Ready | Row] = [_prepare(candidate, device, warmup) for candidate in candidates]
    _sample_in_turn(ready, device, rounds, calls)
    baseline = ready[0] if isinstance(ready[0], _Ready) and ready[0].times else None
    return [_row(one, baseline) if isinstance(one, _Ready) else one for one in ready]


def _sample_in_turn(ready: list[_Ready | Row], device: torch.device, rounds: int, calls: int) -> None:
    """Sample all that are ready; one that fails becomes a row, and if the device fails with it, that is the end."""
    for _ in range(rounds):
        for n, one in enumerate(ready):
            if isinstance(one, _Ready):
                try:
                    one.sample(device, rounds, calls)
                except Exception as error:  # it may fail late, too
                    ready[n] = _failed(one.candidate, error, device)
                    if not _answers(device):
                        return


def _prepare(candidate: Candidate, device: torch.device, warmup: int) -> _Ready | Row:
    try:
        run, seconds = candidate.make(), 0.0
        for _ in range(warmup):
            seconds = _time_once(run, device, 1) / 1e3
        peak = _peak_mib(run, device)
    except Exception as error:  # a peer may fail in any way, and the table says how
        return _failed(candidate, error, device)
    return _Ready(candidate, run, peak, seconds, [])


def _failed(candidate: Candidate, error: Exception, device: torch.device) -> Row:
    if device.type == "cuda" and _answers(device):
        torch.cuda.empty_cache()
    return {"name": candidate.name, "failure": reason(error)}


def _answers(device: torch.device) -> bool:
    """Whether the device still works; after an illegal access of memory, no call of this process to it does."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:  # its type differs with the version of PyTorch
        return False
    return True


def _peak_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _time_once(run: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Milliseconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / calls


def _row(one: _Ready, baseline: _Ready | None) -> Row:
    if not one.times:
        return {"name": one.candidate.name, "failure": "not measured: the device failed before"}
    middle = statistics.median(one.times)
    low, _, high = (
        statistics.quantiles(one.times, n=4, method="inclusive") if len(one.times) > 1 else (middle, middle, middle)
    )
    row: Row = {"name": one.candidate.name, "median_ms": middle, "low_ms": low, "high_ms": high}
    row["ratio"] = None if baseline is None else middle / statistics.median(baseline.times)
    row["peak_mib"] = one.peak_mib
    row["peak_ratio"] = one.peak_mib / baseline.peak_mib if one.peak_mib and baseline and baseline.peak_mib else None
    try:
        row["error"] = None if one.candidate.error is None else one.candidate.error()
    except Exception as error:  # likewise
        row["failure"] = reason(error)
    return row


def reason(error: Exception) -> str:
    """The kind of error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
