"""Training through accelerate: one loop for a laptop, one GPU, many processes and mixed precision.

Processes that torchrun or accelerate started share every batch: each computes the gradient of its rows, and all take
the step that one process would take. So neither losses nor checkpoints depend on how many there are. If one of them is
killed, the others end too (:func:`eotattn.experiments.device.join_processes` says when), and the same command, with
any number of processes, goes on from the last checkpoint. ``torchrun --standalone --max-restarts K`` gives it by itself
where ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` is set: else new processes may read old ones' addresses (pytorch#135712).

Legend: B batch, V classes (the vocabulary, for tokens).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from eotattn.checks import require
from eotattn.experiments.device import join_processes, training_device
from eotattn.experiments.optimisation import TrainingConfig, learning_rate_factor, parameter_groups, split_by_rate
from eotattn.experiments.records import Row
from eotattn.experiments.tasks.batches import IGNORED, Batch
from eotattn.processes import is_first_process, num_processes

__all__ = ["Evaluate", "Row", "Task", "TrainingConfig", "TrainingResult", "autocast", "train", "training_rows"]

#: Called with (network, step) while the network is in evaluation mode; returns measurements.
Evaluate = Callable[[nn.Module, int], Sequence[Row]]


class Task(Protocol):
    """Anything that makes batches out of a seed and a step."""

    def batch(self, batch_size: int, *, seed: int, step: int) -> Batch:
        """Batch of ``batch_size`` sequences; equal (seed, step) give equal batches."""
        ...


@dataclass(frozen=True)
class TrainingResult:
    """What a run measured; the network itself was trained in place.

    Attributes:
        rows: One a logged step: step, loss (nats a token, mean since the last row), learning_rate.
        evaluations: Rows of the evaluation hook, each with its step.
        wall_seconds: Time spent in this process, without what an earlier, interrupted one spent.
        device: Kind of device, e.g. ``"cpu"``.
    """

    rows: list[Row]
    evaluations: list[Row]
    wall_seconds: float
    device: str


def training_rows(result: TrainingResult) -> list[Row]:
    """The loss curve as tidy rows of a record, one a logged step."""
    what = {"panel": "training", "quantity": "training_loss", "unit": "nats per token"}
    return [what | {"step": row["step"], "value": row["loss"]} for row in result.rows]


def autocast(config: TrainingConfig, device: torch.device) -> torch.autocast:
    """The context in which a run's forward passes are computed, for whoever measures the network as it was trained."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def train(
    network: nn.Module,
    task: Task,
    config: TrainingConfig,
    *,
    label: str = "training",
    evaluate: Evaluate | None = None,
    checkpoint: Path | None = None,
) -> TrainingResult:
    """Train ``network`` in place with AdamW on the mean cross-entropy of the targets that count.

    What is predicted is the task's affair: tokens that follow tokens, or the classes of images. The network maps a
    batch's inputs to logits whose last axis has the classes and whose other axes are those of the targets.

    Interrupt it at any time: with ``checkpoint``, the same call continues from the last one written and ends, on one
    CPU with the same number of threads, with the same bits as a run that was never interrupted; with another number of
    processes, with the same curve up to rounding.

    Args:
        network: Maps (B, ...) inputs to logits of shape (*targets.shape, V).
        task: Source of batches.
        config: The run's numbers.
        label: Name on the progress bar, which the first process shows, on terminals only.
        evaluate: Called in every process before the first step, every ``config.evaluate_every`` steps and at the end.
        checkpoint: File that the first process writes and all resume from; its folder must exist.

    Returns:
        A :class:`TrainingResult`.

    Raises:
        ValueError: If ``checkpoint`` was written with another configuration or is not the same for all processes, or
            the batch does not divide.
        RuntimeError: If another process, or the launcher, has ended.
    """
    run = _Run(network, config)
    if checkpoint is not None:
        require(
            checkpoint.parent.is_dir(), "train", "checkpoint", "be in a folder that exists", checkpoint.name, "Make it"
        )
        run.resume(checkpoint)
    started = time.perf_counter()
    quiet = None if is_first_process() else True
    if evaluate is not None and run.step == 0 and config.evaluate_every:
        run.evaluate(evaluate)
    batches = _batches(task, config, run.step, ahead=run.device.type == "cuda")
    with tqdm(total=config.steps, initial=run.step, desc=label, unit="step", disable=quiet, leave=False) as bar:
        for batch in batches:
            run.advance(batch)
            bar.update()
            at_end = run.step == config.steps
            if evaluate is not None and _is_due(run.step, config.evaluate_every, at_end):
                run.evaluate(evaluate)
            if checkpoint is not None and _is_due(run.step, config.checkpoint_every, at_end):
                run.save(checkpoint)
    run.read_losses()
    network.eval()
    return TrainingResult(run.rows, run.evaluations, time.perf_counter() - started, run.device.type)


def _batches(task: Task, config: TrainingConfig, start: int, *, ahead: bool) -> Iterator[Batch]:
    """The batches of the steps from ``start`` on; where ``ahead``, a thread makes the next one in pinned memory."""

    def make(step: int) -> Batch:
        batch = task.batch(config.batch_size, seed=config.seed, step=step)
        return Batch(*(x.pin_memory() for x in batch)) if training_device().type == "cuda" else batch

    if not ahead:
        yield from (make(step) for step in range(start, config.steps))
        return
    with ThreadPoolExecutor(1) as thread:
        coming = [thread.submit(make, step) for step in range(start, min(start + 1, config.steps))]
        for step in range(start, config.steps):
            batch = coming.pop().result()
            if step + 1 < config.steps:
                coming.append(thread.submit(make, step + 1))
            yield batch


def _is_due(step: int, every: int, at_end: bool) -> bool:
    return at_end or (every > 0 and step % every == 0)


class _Objective(nn.Module):
    """A network with its loss, so that both are compiled together and float32 logits are never stored."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross-entropies of the targets that count, nats."""
        logits = self.network(inputs).flatten(0, -2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


@dataclass
class _Run:
    """A run in progress: everything that a checkpoint holds, and the step that advances it."""

    network: nn.Module
    config: TrainingConfig
    step: int = 0
    rows: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        join_processes()
        # Accelerate's mixed precision cannot differ between two runs of one process; autocast can.
        together = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        self.accelerator = Accelerator(
            mixed_precision="no", cpu=training_device().type == "cpu", kwargs_handlers=[together]
        )
        self.device, self.launcher = self.accelerator.device, os.getppid()
        self.num_parts = -(-self.config.accumulation // num_processes())
        parts = num_processes() * self.num_parts
        rule = f"be a multiple of {parts}, processes times the parts of each"
        whole = self.config.batch_size % parts == 0
        require(whole, "train", "batch_size", rule, self.config.batch_size, "Change one of them")
        groups = parameter_groups(self.network, self.config)
        fused = {"fused": True} if self.device.type == "cuda" else {}
        optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.95), **fused)
        self.clipped = [p for p in self.network.parameters() if p.requires_grad]
        if not self.config.clip_priors:
            self.clipped = split_by_rate(self.network)[0]
        objective = _Objective(self.network)
        if self.config.compile:
            torch.compiler.reset()  # of earlier networks' graphs: after a few, the next one would not be compiled
        trained = torch.compile(objective, dynamic=False) if self.config.compile else objective
        self.model, self.optimizer = self.accelerator.prepare(trained, optimizer)
        self.recent = torch.zeros((), dtype=torch.float64, device=self.device)
        self.unread: list[tuple[Row, Tensor]] = []

    def advance(self, batch: Batch) -> None:
        """Take one optimiser step, without waiting for the device."""
        if num_processes() > 1 and os.getppid() != self.launcher:
            raise RuntimeError("train: the launcher of this process has ended, and its next one may be at work already")
        factor = learning_rate_factor(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.model.train()
        self.optimizer.zero_grad()
        parts = self._parts(batch)
        counted = int((batch.targets != IGNORED).sum())
        require(counted > 0, "train", "a batch", "have a target that counts", batch.targets, "Mend the task")
        for k, part in enumerate(parts):
            last = k == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._loss(part, counted)
                self.accelerator.backward(loss)
            self.recent += loss.detach()
        self.accelerator.clip_grad_norm_(self.clipped, self.config.gradient_clip)
        self.optimizer.step()
        self.step += 1
        if self.step % self.config.log_every == 0:
            rate = self.config.learning_rate * factor
            self.unread.append(({"step": self.step, "learning_rate": rate}, self.recent / self.config.log_every))
            self.recent.zero_()

    def read_losses(self) -> None:
        """Fetch logged losses from the device, which waits for it; every process must call it."""
        for row, loss in self.unread:
            mean = float(self.accelerator.reduce(loss, reduction="mean"))
            self.rows.append({"step": row["step"], "loss": mean, "learning_rate": row["learning_rate"]})
        self.unread.clear()

    def evaluate(self, evaluate: Evaluate) -> None:
        """Call the hook with the bare network in evaluation mode."""
        self.network.eval()
        with torch.no_grad(), autocast(self.config, self.device):
            self.evaluations.extend({"step": self.step, **row} for row in evaluate(self.network, self.step))

    def save(self, path: Path) -> None:
        """Write a checkpoint, in one process; whoever reads sees the old file or the new one, never a part."""
        self.read_losses()
        recent = self.accelerator.reduce(self.recent, reduction="mean")  # so each of any number of others may take it
        if not is_first_process():
            return
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "rows": self.rows,
            "evaluations": self.evaluations,
            "recent": recent,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random_state": torch.get_rng_state(),
        }
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Continue from ``path`` if it exists; every process must call it."""
        if path.exists():
            self._load(path)
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.device)).tolist()
        remedy = "Use a folder that all machines see"
        require(len(set(steps)) == 1, "train", "checkpoint", "be one file for all processes", f"steps {steps}", remedy)

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        same = state["config"] == asdict(self.config)
        remedy = "Pass that configuration, or another checkpoint file"
        require(same, "train", "checkpoint", "come from the same TrainingConfig", state["config"], remedy)
        self.step, self.rows, self.evaluations = state["step"], state["rows"], state["evaluations"]
        self.recent.copy_(state["recent"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random_state"])

    def _parts(self, batch: Batch) -> list[Batch]:
        """This process's rows of the global batch, on its device, in as many parts as are accumulated."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        inputs, targets = (x[rank::world].to(self.device, non_blocking=True).chunk(self.num_parts) for x in batch)
        return [Batch(*pair) for pair in zip(inputs, targets, strict=True)]

    def _loss(self, part: Batch, counted: int) -> Tensor:
        """This part's share of the mean cross-entropy over the ``counted`` targets of the global batch, nats a target.

        Times the number of processes, because gradients are averaged over them.
        """
        with autocast(self.config, self.device):
            total: Tensor = self.model(part.inputs, part.targets)
        return total * (self.accelerator.num_processes / counted)
