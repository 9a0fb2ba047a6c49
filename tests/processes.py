"""Cases that several processes run together over gloo on a CPU."""

import multiprocessing
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_together(cases, count, folder):
    """Let ``count`` processes run every case with their rank; what fails leaves its traceback in ``folder``."""
    everyone = multiprocessing.get_context("spawn").Barrier(count)
    try:
        mp.spawn(_work, args=(cases, count, str(folder), everyone), nprocs=count)
    except mp.ProcessRaisedException:
        if not any(Path(folder).glob("*.*")):
            raise


def reports(case, folder):
    """Tracebacks of the processes in which the case failed, or a note that it was not reached."""
    found = [path.read_text() for path in sorted(Path(folder).glob(f"{case.__name__}.*"))]
    return found if found or Path(folder, case.__name__).exists() else ["an earlier case failed"]


class Gather(torch.autograd.Function):
    """The tensors of all processes side by side, (N, ...); every process adds to the gradient of each."""

    @staticmethod
    def forward(ctx, part):
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def _work(rank, cases, count, folder, everyone):
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=patience)
    torch.set_num_threads(1)
    for case in cases:
        try:
            case(rank)
        except Exception:
            Path(folder, f"{case.__name__}.{rank}").write_text(traceback.format_exc())
            raise  # the others wait for messages of this case: no later one would be in step
        dist.barrier()
        Path(folder, case.__name__).touch()
    everyone.wait()  # with no message left on its way, a process that leaves first aborts no other
    dist.destroy_process_group()
