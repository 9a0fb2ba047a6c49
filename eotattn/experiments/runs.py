"""Runs: the one notion of an independent run, the records that finished runs leave, and how runs are made.

A study is a list of runs. Each run trains one network and measures it; what it found is a record: rows, a few small
arrays, and where they come from. A study is built from records alone, so that it can be drawn where nothing was
trained. How one is written (``studies/copy_mixture.py`` is a real one):

1. A frozen dataclass that holds everything a run's result depends on, with a ``seed``, and a function of a module that
   makes the run. torch's global generator has been seeded with that seed when it is called::

    @dataclass(frozen=True)
    class ReaderRun:
        network: CopyReaderConfig
        training: TrainingConfig

        @property
        def seed(self) -> int:
            return self.training.seed

    def measure(configuration: ReaderRun, checkpoint: Path) -> Measurement:
        network = CopyReader(configuration.network)
        training = train(network, task, configuration.training, checkpoint=checkpoint)
        return Measurement(rows=[{"quantity": "loss", "value": 1.2}], arrays={"prior": array}, summary="loss 1.20")

2. A function that lists the runs. It is given the records that exist, and asked again until it names no new run; so a
   run may depend on what others found, such as the best rate of a sweep::

    def runs(recipe: Recipe, records: Records) -> list[Run]:
        return [Run(f"goat-seed{seed}", ReaderRun(...), measure) for seed in recipe.seeds]

3. A study made of a recipe and ``perform(runs, recipe, folder)``, the records by name::

    CopyMixtureStudy(recipe, records)

One line in :data:`eotattn.experiments.reproduce.FIGURES` then gives the study to ``eotattn train`` and ``reproduce``.
"""

from __future__ import annotations

import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing import connection, get_context
from typing import Any

import torch

from eotattn.checks import called, check_positive, check_positive_int, require
from eotattn.experiments.device import training_device
from eotattn.experiments.records import Measurement, Record, Records, Run, RunFolder, make
from eotattn.experiments.results import ResultFolder
from eotattn.processes import agreed, num_processes

__all__ = [
    "Measurement",
    "Plan",
    "Record",
    "Records",
    "Run",
    "RunsFailedError",
    "UnknownRunsError",
    "default_jobs",
    "perform",
]

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
    time: finished runs are kept, unfinished ones continue from their last checkpoint at the next call.

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
    failed: list[str] = []
    named: dict[str, Run] = {}
    while new := [run for run in plan(recipe, records) if run.name not in named]:
        named |= {run.name: run for run in new}
        missing = []
        for run in new:
            record = agreed(store.read(run))
            if record is not None:
                records[run.name] = record
                report(f"{run.name}: stored, {record.device}, {record.date}; {record.summary}")
            elif not only or any(fnmatch(run.name, pattern) for pattern in only):
                missing.append(run)
        started = time.monotonic()
        for made, (name, outcome) in enumerate(_made(missing, store, min(jobs, len(missing)), deadline), 1):
            if isinstance(outcome, Record):
                records[name] = outcome
                left = (time.monotonic() - started) / made * (len(missing) - made)
                done = f"{len(records)} of {len(named)}" + (f", about {_duration(left)} left" if left else "")
                report(f"{name}: {outcome.seconds:.0f} s on {outcome.device}; {outcome.summary} ({done})")
            else:
                failed.append(name)
                report(f"{name}: FAILED\n{outcome}")
        late = sum(run.name not in records and run.name not in failed for run in missing)
        if late:
            report(f"{late} runs did not start within {minutes:g} minutes; the same command goes on")
    unknown = [pattern for pattern in only if not any(fnmatch(name, pattern) for name in named)]
    if failed:
        raise RunsFailedError([name for name in named if name in failed])
    if unknown:
        raise UnknownRunsError(unknown, list(named))
    return {name: records[name] for name in named if name in records}


def _duration(seconds: float) -> str:
    """Two digits at most.

    Example:
        >>> [_duration(seconds) for seconds in (0.2, 89.0, 700.0, 9000.0)]
        ['1 s', '89 s', '12 min', '2.5 h']
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"


def _made(runs: Sequence[Run], store: RunFolder, jobs: int, deadline: float) -> Iterator[tuple[str, Record | str]]:
    """Make runs until the deadline; yield the record of each, or the traceback where it failed, as they finish."""
    if jobs > 1:
        yield from _side_by_side(runs, store, jobs, deadline)
        return
    for run in runs:
        if agreed(time.monotonic() < deadline):
            yield run.name, agreed(_attempt(run, store))


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


# Side by side -------------------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    """A spawned process that makes one run after the other."""

    process: Any
    pipe: connection.Connection
    run: Run | None = None

    @classmethod
    def start(cls, store: RunFolder, threads: int, device: int) -> _Worker:
        """Spawn: a forked process could not use CUDA."""
        context = get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, store, threads, device), daemon=True)
        process.start()
        there.close()
        return cls(process, here)

    def give(self, run: Run) -> None:
        """Hand over a run; if the process is dead, that is what :meth:`result` will say."""
        self.run = run
        with suppress(OSError):
            self.pipe.send(run)

    def result(self) -> str | None:
        """The traceback of the run that has just ended, None where it left a record."""
        try:
            answer: str | None = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return f"its process ended with exit code {self.process.exitcode}"
        return answer

    def stop(self) -> None:
        """End the process; what it was making continues from its checkpoint another time."""
        self.pipe.close()
        self.process.join(0 if self.run else 10)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def _work(pipe: connection.Connection, store: RunFolder, threads: int, device: int) -> None:
    """Make the runs that come through ``pipe`` until it closes; Ctrl-C is the parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    if training_device().type == "cuda":
        torch.cuda.set_device(device)
    try:
        while True:
            outcome = _attempt(pipe.recv(), store)
            pipe.send(None if isinstance(outcome, Record) else outcome)
    except (EOFError, BrokenPipeError):
        return


def _side_by_side(
    runs: Sequence[Run], store: RunFolder, jobs: int, deadline: float
) -> Iterator[tuple[str, Record | str]]:
    """Like :func:`_made` in ``jobs`` processes; a process that dies loses one run, and another takes its place."""
    threads = max(1, torch.get_num_threads() // jobs)
    devices = max(1, torch.cuda.device_count())
    waiting = list(runs)
    workers = [_Worker.start(store, threads, k % devices) for k in range(jobs)]
    try:
        for worker in workers:
            worker.give(waiting.pop(0))
        while busy := [worker for worker in workers if worker.run is not None]:
            for ready in connection.wait([worker.pipe for worker in busy]):
                k = next(k for k, worker in enumerate(workers) if worker.pipe is ready)
                run, error = workers[k].run, workers[k].result()
                assert run is not None
                workers[k].run = None
                if waiting and time.monotonic() < deadline:
                    if not workers[k].process.is_alive():
                        workers[k] = _Worker.start(store, threads, k % devices)
                    workers[k].give(waiting.pop(0))
                yield run.name, _record(run, store) if error is None else error
    finally:
        for worker in workers:
            worker.stop()


def _record(run: Run, store: RunFolder) -> Record:
    record = store.read(run)
    assert record is not None
    return record
