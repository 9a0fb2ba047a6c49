"""Training through accelerate: one loop for a laptop, one GPU, many processes and mixed precision.

Legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from eotattn.checks import check_choice, check_positive, check_positive_int, require
from eotattn.experiments.tasks import Batch
from eotattn.priors import LogPrior

__all__ = [
    "Evaluate",
    "Row",
    "Task",
    "TrainingConfig",
    "TrainingResult",
    "learning_rate_factor",
    "train",
    "training_rows",
]

#: One measurement: column name -> value.
Row = dict[str, Any]

#: Called with (network, step) while the network is in evaluation mode; returns measurements.
Evaluate = Callable[[nn.Module, int], Sequence[Row]]


class Task(Protocol):
    """Anything that makes batches out of a seed and a step."""

    def batch(self, batch_size: int, *, seed: int, step: int) -> Batch:
        """Batch of ``batch_size`` sequences; equal (seed, step) give equal batches."""
        ...


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that a training run depends on, apart from network and task.

    Args:
        steps: Optimiser steps.
        batch_size: Sequences a step, over all processes; divisible by their number.
        learning_rate: Peak rate of AdamW for the content.
        prior_learning_rate: Peak rate for log-priors, whose parameters are nats. They get no weight decay, which would
            pull a learned prior back to uniform.
        warmup_steps: Steps of linear warm-up; a cosine to a tenth of the peak follows.
        weight_decay: Decay of matrices, relative to the rate.
        gradient_clip: Largest gradient norm.
        seed: Seed of the batches.
        precision: ``"no"`` (fp32), ``"bf16"`` or ``"fp16"``, as accelerate names them.
        log_every: Steps that one row of the loss averages over.
        evaluate_every: Steps between calls of the evaluation hook; 0 calls it at the end alone.
        checkpoint_every: Steps between checkpoints; 0 writes one at the end alone.

    Example:
        >>> TrainingConfig(steps=10, batch_size=4).learning_rate
        0.001
    """

    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    prior_learning_rate: float = 1e-3
    warmup_steps: int = 0
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    seed: int = 0
    precision: str = "no"
    log_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        owner = "TrainingConfig"
        for name in ("steps", "batch_size", "log_every"):
            check_positive_int(owner, name, getattr(self, name))
        for name in ("warmup_steps", "seed", "evaluate_every", "checkpoint_every"):
            check_positive_int(owner, name, getattr(self, name), minimum=0)
        for name in ("learning_rate", "prior_learning_rate", "gradient_clip"):
            check_positive(owner, name, getattr(self, name))
        check_positive(owner, "weight_decay", self.weight_decay, allow_zero=True)
        check_choice(owner, "precision", self.precision, ("no", "bf16", "fp16"))
        fits = self.warmup_steps < self.steps
        require(fits, owner, "warmup_steps", f"be below steps = {self.steps}", self.warmup_steps, "Train for longer")


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


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Share of the peak rate at a step: linear warm-up, then a cosine down to a tenth.

    Example:
        >>> config = TrainingConfig(steps=100, batch_size=1, warmup_steps=10)
        >>> [round(learning_rate_factor(step, config), 3) for step in (0, 9, 10, 99)]
        [0.1, 1.0, 1.0, 0.1]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    network: nn.Module,
    task: Task,
    config: TrainingConfig,
    *,
    label: str = "training",
    evaluate: Evaluate | None = None,
    checkpoint: Path | None = None,
) -> TrainingResult:
    """Train ``network`` in place with AdamW on the mean cross-entropy of the next token.

    Interrupt it at any time: with ``checkpoint``, the same call continues from the last one written and ends, on one
    CPU, with the same bits as a run that was never interrupted.

    Args:
        network: Maps (B, L) tokens to (B, L, V) logits.
        task: Source of batches.
        config: The run's numbers.
        label: Name on the progress bar, which shows on terminals only.
        evaluate: Called every ``config.evaluate_every`` steps and at the end.
        checkpoint: File to write and to resume from; its folder must exist.

    Returns:
        A :class:`TrainingResult`.

    Raises:
        ValueError: If ``checkpoint`` was written with another configuration, or the batch does not divide.
    """
    run = _Run(network, config)
    if checkpoint is not None:
        require(
            checkpoint.parent.is_dir(), "train", "checkpoint", "be in a folder that exists", checkpoint.name, "Make it"
        )
        run.resume(checkpoint)
    started = time.perf_counter()
    quiet = None if run.accelerator.is_local_main_process else True
    with tqdm(total=config.steps, initial=run.step, desc=label, unit="step", disable=quiet, leave=False) as bar:
        while run.step < config.steps:
            run.advance(task)
            bar.update()
            at_end = run.step == config.steps
            if evaluate is not None and _is_due(run.step, config.evaluate_every, at_end):
                run.evaluate(evaluate)
            if checkpoint is not None and _is_due(run.step, config.checkpoint_every, at_end):
                run.save(checkpoint)
    return TrainingResult(run.rows, run.evaluations, time.perf_counter() - started, run.accelerator.device.type)


def _is_due(step: int, every: int, at_end: bool) -> bool:
    return at_end or (every > 0 and step % every == 0)


def _parameter_groups(network: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Matrices with decay, vectors without, log-priors without and at their own rate; frozen parameters in none."""
    of_priors = {id(p) for module in network.modules() if isinstance(module, LogPrior) for p in module.parameters()}
    trainable = [p for p in network.parameters() if p.requires_grad]
    matrices = [p for p in trainable if id(p) not in of_priors and p.dim() >= 2]
    vectors = [p for p in trainable if id(p) not in of_priors and p.dim() < 2]
    priors = [p for p in trainable if id(p) in of_priors]
    groups = [
        {"params": matrices, "peak": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": vectors, "peak": config.learning_rate, "weight_decay": 0.0},
        {"params": priors, "peak": config.prior_learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass
class _Run:
    """A run in progress: everything that a checkpoint holds, and the step that advances it."""

    network: nn.Module
    config: TrainingConfig
    step: int = 0
    rows: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Log-priors compute positions in float64, which Apple's GPUs lack: without CUDA, train on the CPU.
        self.accelerator = Accelerator(mixed_precision=self.config.precision, cpu=not torch.cuda.is_available())
        shares = self.config.batch_size % self.accelerator.num_processes == 0
        rule = f"be a multiple of the number of processes, {self.accelerator.num_processes}"
        require(shares, "train", "batch_size", rule, self.config.batch_size, "Change one of them")
        groups = _parameter_groups(self.network, self.config)
        optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.95))
        self.model, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.recent = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)

    def advance(self, task: Task) -> None:
        """Take one optimiser step."""
        factor = learning_rate_factor(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.model.train()
        loss = self._loss(self._share(task.batch(self.config.batch_size, seed=self.config.seed, step=self.step)))
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.recent += loss.detach()
        self.step += 1
        if self.step % self.config.log_every == 0:
            mean = self.accelerator.reduce(self.recent / self.config.log_every, reduction="mean")
            rate = self.config.learning_rate * factor
            self.rows.append({"step": self.step, "loss": float(mean), "learning_rate": rate})
            self.recent.zero_()

    def evaluate(self, evaluate: Evaluate) -> None:
        """Call the hook with the bare network in evaluation mode."""
        bare = self.accelerator.unwrap_model(self.model).eval()
        with torch.no_grad():
            self.evaluations.extend({"step": self.step, **row} for row in evaluate(bare, self.step))

    def save(self, path: Path) -> None:
        """Write a checkpoint; whoever reads sees the old file or the new one, never a part."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "rows": self.rows,
            "evaluations": self.evaluations,
            "recent": self.recent,
            "network": self.accelerator.unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random_state": torch.get_rng_state(),
        }
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Continue from ``path`` if it exists."""
        if not path.exists():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        same = state["config"] == asdict(self.config)
        remedy = "Pass that configuration, or another checkpoint file"
        require(same, "train", "checkpoint", "come from the same TrainingConfig", state["config"], remedy)
        self.step, self.rows, self.evaluations = state["step"], state["rows"], state["evaluations"]
        self.recent.copy_(state["recent"])
        self.accelerator.unwrap_model(self.model).load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random_state"])

    def _share(self, batch: Batch) -> Batch:
        """This process's rows of the global batch, on its device."""
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        return Batch(batch.inputs[rank::world].to(device), batch.targets[rank::world].to(device))

    def _loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy, nats a token."""
        logits: Tensor = self.model(batch.inputs)
        return functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
