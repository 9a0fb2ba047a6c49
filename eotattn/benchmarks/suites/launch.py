"""Suites over several processes: started here, one a GPU, or a few over gloo on a CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.timing import Row

__all__ = ["measure_together"]

#: How long a process waits for another one's message: others compile meanwhile.
PATIENCE = timedelta(minutes=3)
#: What a process measures, in step with the others.
Work = Callable[[Configuration], Iterable[Row]]


def measure_together(work: Work, config: Configuration, count: int) -> Iterator[Row]:
    """The rows of the first of ``count`` processes that call ``work`` in step; of this process if it is one.

    Args:
        work: Function of a module; it is called with a configuration that names the process's own device.
        config: How the suite is run.
        count: Number of processes.

    Yields:
        Rows; the last one says why, if a process failed.
    """
    if count == 1:
        yield from work(config)
        return
    with tempfile.TemporaryDirectory() as folder:
        failure = None
        try:
            multiprocessing.spawn(_work, args=(work, config, count, folder), nprocs=count)
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            failure = str(error).strip().splitlines()[-1][:240]
        rows = Path(folder, "rows0")
        yield from map(json.loads, rows.read_text().splitlines() if rows.exists() else ())
    if failure is not None:
        yield {"name": f"eotattn, {count} processes", "failure": failure}


def _work(rank: int, work: Work, config: Configuration, count: int, folder: str) -> None:
    if config.device == "cuda":
        torch.cuda.set_device(rank)
        config = replace(config, device=f"cuda:{rank}")
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    backend, store = "nccl" if config.device.startswith("cuda") else "gloo", f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=count, timeout=PATIENCE)
    with Path(folder, f"rows{rank}").open("w") as file:
        for row in work(config):
            print(json.dumps(row), file=file, flush=True)
    dist.barrier()
    dist.destroy_process_group()
