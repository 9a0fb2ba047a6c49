"""Runs: how the independent runs of a study are made, kept and read.

A study is a list of runs; each trains one network and measures it, and what it found is a record: rows, and where they
come from. Tables, claims and pictures are built from records alone, so that they can be drawn where nothing was
trained. ``figures/fig1_copy_mixture.py`` is a short one: a frozen dataclass that holds all that a run depends on, a
function that makes it (torch's global generator has been seeded), and a plan that lists the runs. The plan is given the
records that exist and asked again until it names no new run, so a run may depend on what others found.
"""

from __future__ import annotations

import math
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatch
from multiprocessing import active_children, get_context
from typing import Any

import torch

from eotattn.checks import called, check_positive, check_positive_int, require
from eotattn.experiments.device import training_device
from eotattn.experiments.records import Record, Records, Run, RunFolder, make
from eotattn.experiments.results import ResultFolder
from eotattn.processes import agreed, is_first_process, num_processes

__all__ = ["Plan", "RunsFailedError", "UnknownRunsError", "default_jobs", "perform", "stored_records"]

#: (recipe, records so far) -> the runs that can be named by now.
Plan = Callable[[Any, Records], Sequence[Run]]


class RunsFailedError(RuntimeError):
    """Some runs of a study failed; the others are finished and kept.

    Attributes:
        names: Names of the runs that failed.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"runs failed: {', '.join(names)}. The others are kept; the same command tries these again")
        self.names = tuple(names)


class UnknownRunsError(ValueError):
    """Patterns that name no run of a study.

    Attributes:
        patterns: What was asked for.
    """

    def __init__(self, patterns: Sequence[str], known: Sequence[str]) -> None:
        rule = f"only must name runs of the study; got {list(patterns)}"
        remedy = f"There are {', '.join(known)}; others are named when those that they depend on are stored"
        super().__init__(f"{called('perform')}: {rule}. {remedy}.")
        self.patterns = tuple(patterns)


def default_jobs() -> int:
    """One run a GPU, as many as torch has threads on a CPU; one where processes of a launcher share each run."""
    if num_processes() > 1:
        return 1
    return torch.cuda.device_count() if training_device().type == "cuda" else torch.get_num_threads()


def stored_records(plan: Plan, recipe: Any, folder: ResultFolder) -> tuple[dict[str, Record], list[str]]:
    """Records of the finished runs of a study, and the names of those that are missing, in the order of the plan."""
    store = RunFolder(folder)
    found: dict[str, Record | None] = {}
    while new := [run for run in plan(recipe, _known(found)) if run.name not in found]:
        found |= {run.name: store.read(run) for run in new}
    return _known(found), [name for name, record in found.items() if record is None]


def _known(found: dict[str, Record | None]) -> dict[str, Record]:
    return {name: record for name, record in found.items() if record is not None}


def perform(
    plan: Plan,
    recipe: Any,
    folder: ResultFolder,
    *,
    jobs: int | None = None,
    only: Sequence[str] = (),
    minutes: float = math.inf,
    report: Callable[[str], None] = print,
) -> dict[str, Record]:
    """Make the runs of a study that are missing, and return the records of all.

    A stored record is used if its configuration is equal to the run's, compared as JSON. Interrupt the call at any
    time: finished runs are kept, unfinished ones continue from their last checkpoint at the next call. Runs that choose
    come first: no other run starts before all that can be named are stored, or have failed in this call.

    Args:
        plan: Lists the study's runs.
        recipe: Handed to ``plan``.
        folder: Where the figure's files are; records go to ``.runs/<figure>`` in it.
        jobs: Runs side by side, each in a process of its own; 1 makes them in this process. By default
            :func:`default_jobs`. Results do not depend on it.
        only: Names of runs, or patterns such as ``"goat-*"``; all runs by default. Others are read, not made.
        minutes: No run starts later than this after the call; those that have started are finished.
        report: Receives one line a run.

    Returns:
        Records by name, in the order of the plan.

    Raises:
        RunsFailedError: In the end, if a run raised; the report has its traceback.
        UnknownRunsError: In the end, a ValueError, if a pattern of ``only`` names no run.
    """
    jobs = default_jobs() if jobs is None else check_positive_int("perform", "jobs", jobs)
    rule, remedy = "be 1 where the processes of a launcher share each run", "Leave it out"
    require(jobs == 1 or num_processes() == 1, "perform", "jobs", rule, jobs, remedy)
    deadline = time.monotonic() + 60 * check_positive("perform", "minutes", minutes, allow_inf=True)
    store = RunFolder(folder)
    records: dict[str, Record] = {}
    named: dict[str, Run] = {}
    failed: dict[str, bool] = {}

    def due() -> list[Run]:
        """Names what can be named by now, reads what is stored, and tells what is to be made next."""
        while new := [run for run in plan(recipe, records) if run.name not in named]:
            for run in new:
                named[run.name] = run
                record = agreed(store.read(run))
                if record is not None:
                    records[run.name] = record
                    report(f"{run.name}: stored, {record.device}, {record.date}; {record.summary}")
        missing = [run for run in named.values() if run.name not in records]
        untried = [run for run in missing if run.name not in failed]
        choices = [run for run in untried if run.chooses]
        if not choices and is_first_process():
            _drop_weights(named, missing, store)
        ready = [run for run in untried if run.continues is None or run.continues.name in records]
        return [run for run in choices or ready if _matches(run.name, only)]

    while batch := due():
        if not agreed(time.monotonic() < deadline):
            break
        started = time.monotonic()
        for made, (name, outcome) in enumerate(_made(batch, store, min(jobs, len(batch)), deadline), 1):
            failed[name] = not isinstance(outcome, Record)
            if isinstance(outcome, Record):
                records[name] = outcome
                seconds = (time.monotonic() - started) / made * (len(batch) - made)
                done = f"{len(records)} of {len(named)}" + (f", about {_duration(seconds)} left" if seconds else "")
                report(f"{name}: {outcome.seconds:.0f} s on {outcome.device}; {outcome.summary} ({done})")
            else:
                report(f"{name}: FAILED\n{outcome}")
    if batch:
        report(f"{len(batch)} runs did not start within {minutes:g} minutes; the same command goes on")
    unmade = [run for run in named.values() if run.name not in records]
    if any(run.chooses for run in unmade) and any(not run.chooses and _matches(run.name, only) for run in unmade):
        report("some runs wait for choices that are not stored")
    if any(failed.values()):
        raise RunsFailedError([name for name in named if failed.get(name)])
    unknown = [pattern for pattern in only if not any(fnmatch(name, pattern) for name in named)]
    if unknown:
        raise UnknownRunsError(unknown, list(named))
    return {name: records[name] for name in named if name in records}


def _drop_weights(named: Mapping[str, Run], missing: Sequence[Run], store: RunFolder) -> None:
    """Delete what choosing runs trained and no missing run continues."""
    wanted = {run.continues.name for run in missing if run.continues is not None}
    for run in named.values():
        if run.chooses and run.name not in wanted:
            store.checkpoint(run).unlink(missing_ok=True)


def _matches(name: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatch(name, pattern) for pattern in only)


def _duration(seconds: float) -> str:
    """Two digits at most.

    Example:
        >>> [_duration(seconds) for seconds in (0.2, 89.0, 700.0, 9000.0)]
        ['1 s', '89 s', '12 min', '2.5 h']
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"


def _attempt(run: Run, store: RunFolder) -> Record | str:
    """A run's record, or the traceback of its exception: one failing run must not take the others with it.

    Where processes share a run, the exception ends this one: the others would wait for it.
    """
    try:
        return make(run, store)
    except Exception:
        if num_processes() > 1:
            raise
        return traceback.format_exc()


def _made(runs: Sequence[Run], store: RunFolder, jobs: int, deadline: float) -> Iterator[tuple[str, Record | str]]:
    """Make runs until the deadline; yield the record of each, or the traceback where it failed, as they finish."""
    if jobs > 1:
        yield from _side_by_side(runs, store, jobs, deadline)
        return
    for run in runs:
        if agreed(time.monotonic() < deadline):
            yield run.name, agreed(_attempt(run, store))


def _side_by_side(
    runs: Sequence[Run], store: RunFolder, jobs: int, deadline: float
) -> Iterator[tuple[str, Record | str]]:
    """The same in ``jobs`` pools of one process each, so that one that dies takes one run with it alone."""
    bystanders = set(active_children())
    pools = [_pool(k, jobs) for k in range(jobs)]
    idle, waiting = deque(range(jobs)), deque(runs)
    busy: dict[Future[Record | str], tuple[int, Run]] = {}
    try:
        while True:
            while idle and waiting and time.monotonic() < deadline:
                k, run = idle.popleft(), waiting.popleft()
                busy[pools[k].submit(_attempt, run, store)] = k, run
            if not busy:
                return
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                k, run = busy.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    outcome, pools[k] = "its process ended before the run did", _pool(k, jobs)
                idle.append(k)
                yield run.name, outcome
    finally:
        for child in set(active_children()) - bystanders if busy else ():
            child.terminate()  # what it was making continues from its checkpoint another time
        for pool in pools:
            pool.shutdown()


def _pool(k: int, jobs: int) -> ProcessPoolExecutor:
    """A process on the k-th GPU, or on its share of the threads; spawned, since a forked one could not use CUDA."""
    threads = max(1, torch.get_num_threads() // jobs)
    device = k % max(1, torch.cuda.device_count())
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin, initargs=(threads, device))


def _begin(threads: int, device: int) -> None:
    """Ctrl-C is the parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    if training_device().type == "cuda":
        torch.cuda.set_device(device)
