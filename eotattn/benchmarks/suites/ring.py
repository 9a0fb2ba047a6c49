"""A sequence shared between GPUs by PyTorch's ``context_parallel``, with and without lanes, against one GPU.

Legend: H heads, L tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from eotattn.attention import prior_attention
from eotattn.attention.call_positions import Shard
from eotattn.attention.statistics import SequenceStatistics, row_statistics
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import gpt_prior, measured, output_of, trained
from eotattn.benchmarks.suites.launch import measure_together
from eotattn.benchmarks.timing import Candidate, Row, measure
from eotattn.priors import LogPrior

__all__ = ["ring"]

#: The longest sequence that one GPU attends to alone, for comparison.
LONGEST_ALONE = 131072
#: Queries whose weights are compared with the definition.
NUM_ROWS = 4
Content = tuple[Tensor, Tensor, Tensor]


def ring(config: Configuration) -> Iterator[Row]:
    """Forward, and forward and backward, on one GPU and on all of them; what lanes cost, and how exact they are."""
    count = torch.cuda.device_count() if config.device == "cuda" else 1
    yield from measure_together(partial(_work, count=count), config, count)
    if count == 1:
        yield {"name": "PyTorch's ring", "failure": f"it shares work between GPUs; got one process on {config.device}"}


def _work(config: Configuration, count: int) -> Iterator[Row]:
    """Measure in step with the other processes."""
    heads, width = config.pick([(2, 16)], [(8, 64)])[0]
    for length in config.pick([64], [131072, 1048576]):
        yield from _rows(config, count, heads, length, width)


def _rows(config: Configuration, count: int, heads: int, length: int, width: int) -> list[Row]:
    prior = trained(gpt_prior(heads), config)
    size = {"heads": heads, "length": length, "width": width}
    rows: list[Row] = []
    for name, kernel in _kernels(config).items():
        for backward in (False, True):
            told = {**size, "kernel": name, "pass": "both" if backward else "forward"}
            with sdpa_kernel(kernel) if kernel else nullcontext():
                alone: list[Row] = []
                if length <= LONGEST_ALONE:
                    whole = _content(config, heads, length, width)
                    alone = _measured(_candidates(whole, prior, "one process", backward=backward), config, length)
                shared = _in_ring(config, count, (heads, length, width), prior, backward=backward) if count > 1 else []
            baseline = (alone or shared)[0].get("median_ms")
            for row in (*alone, *shared):
                row["ratio"] = row["median_ms"] / baseline if baseline and "median_ms" in row else None
                rows.append({**told, **row})
    rows.append(
        {**size, "name": "eotattn, recency + sink", "quantity": "TV", "value": _variation(config, prior, length)}
    )
    if count > 1:
        rows += [{**size, "pass": "statistics", **row} for row in _statistics(config, count, prior, length, width)]
    return rows


def _measured(candidates: Sequence[Candidate], config: Configuration, length: int) -> list[Row]:
    """Time the candidates; where a call takes seconds, a few single ones."""
    if length <= LONGEST_ALONE:
        return measured(candidates, config)
    return measure(candidates, device=torch.device(config.device), rounds=min(3, config.rounds), warmup=1, calls=1)


def _kernels(config: Configuration) -> dict[str, SDPBackend | None]:
    """The kernels that the ring knows in 16 bits; on a CPU its only one."""
    if config.device == "cpu":
        return {"default": None}
    return {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def _content(config: Configuration, heads: int, length: int, width: int, part: Tensor | None = None) -> Content:
    """Query, key and value of all tokens, or of those at the positions ``part``; alike on all processes."""
    generator = torch.Generator(config.device).manual_seed(config.seed)
    sides = []
    for _ in range(3):
        side = torch.randn(1, heads, length, width, generator=generator, **config.place)
        sides.append((side if part is None else side[:, :, part]).requires_grad_())
    return sides[0], sides[1], sides[2]


def _candidates(content: Content, prior: LogPrior, where: str, *, backward: bool) -> list[Candidate]:
    bare = partial(functional.scaled_dot_product_attention, *content, is_causal=True)
    ours = partial(prior_attention, *content, prior=prior, is_causal=True, backend="sdpa")
    learned = [*prior.parameters()] if backward else []
    return [
        Candidate(f"SDPA, {where}", partial(_timed, bare, [*content], backward)),
        Candidate(f"eotattn, recency + sink, {where}", partial(_timed, ours, [*content, *learned], backward)),
    ]


def _timed(attend: Callable[[], Any], inputs: Sequence[Tensor], backward: bool) -> Callable[[], Any]:
    def both() -> Any:
        output = attend()
        return torch.autograd.grad(output, inputs, torch.ones_like(output))

    return both if backward else torch.no_grad()(attend)


def _in_ring(
    config: Configuration, count: int, size: tuple[int, int, int], prior: LogPrior, *, backward: bool
) -> list[Row]:
    """The same with the tokens of this process in PyTorch's ring, and how far it is from one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    heads, length, width = size
    shard = Shard(0, length, dist.get_rank(), count, is_balanced=True)
    mine = shard.positions(config.place["device"])
    content = _content(config, heads, length, width, mine)
    mesh = init_device_mesh("cuda", (count,))
    with context_parallel(mesh, buffers=[torch.zeros(2 * count, device=config.device)], buffer_seq_dims=[0]):
        rows = _measured(_candidates(content, prior, f"{count} processes", backward=backward), config, length)
        output = _output(content, prior)
    if length <= LONGEST_ALONE and not backward:
        whole = _output(_content(config, heads, length, width), prior)[:, :, mine]
        error = (output - whole).norm() / whole.norm()
        dist.all_reduce(error, dist.ReduceOp.MAX)
        rows[-1]["error"] = float(error)
    return rows


@torch.no_grad()
def _output(content: Content, prior: LogPrior) -> Tensor:
    """(1, H, L, D) float32."""
    return output_of(prior_attention(*content, prior=prior, is_causal=True)).float()


@torch.no_grad()
def _variation(config: Configuration, prior: LogPrior, length: int) -> float:
    """Largest total variation between attention weights by lanes and by the definition, at the last queries."""
    at = torch.arange(length, device=config.device)
    rows = at[-NUM_ROWS:]
    lanes = prior.lanes(at, at, dtype=config.place["dtype"])
    written = lanes.query[..., -NUM_ROWS:, :].double() @ lanes.key.double().mT
    exact = prior.dense(rows, at, dtype=torch.float64)
    shares = [table.masked_fill(at > rows[:, None], float("-inf")).softmax(-1) for table in (written, exact)]
    return float((shares[0] - shares[1]).abs().sum(-1).max() / 2)


def _statistics(config: Configuration, count: int, prior: LogPrior, length: int, width: int) -> list[Row]:
    """All statistics: each process has two runs of queries and all keys; what they sum is added."""
    rank, heads, size = dist.get_rank(), prior.num_heads, length // (2 * count)
    query, key, value = (side.detach() for side in _content(config, heads, length, width))
    at = torch.arange(length, device=config.device)
    runs = [at[part * size : (part + 1) * size] for part in (rank, 2 * count - 1 - rank)]

    def all_statistics() -> list[Any]:
        sums = [
            SequenceStatistics.of(
                row_statistics(
                    query[:, :, run[0] : run[-1] + 1], key[:, :, : run[-1] + 1], is_causal=True,
                    query_start=int(run[0]), log_prior=prior.lanes(run, at[: run[-1] + 1], dtype=key.dtype),
                )
            )
            for run in runs
        ]  # fmt: skip
        everyone: list[Any] = [None] * count
        dist.all_gather_object(everyone, sums[0].continued(sums[1]))
        return everyone

    with torch.no_grad():
        forward = partial(functional.scaled_dot_product_attention, query, key, value, is_causal=True)
        candidates = [
            Candidate("SDPA, one process", lambda: forward),
            Candidate(f"eotattn, statistics, {count} processes", lambda: all_statistics),
        ]
        return _measured(candidates, config, length)
