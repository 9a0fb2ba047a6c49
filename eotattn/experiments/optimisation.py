"""How a network is optimised: the numbers of a run, the learning rate at a step, and which parameters decay."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from eotattn.attention import AttentionSinks
from eotattn.checks import check_choice, check_positive, check_positive_int, require
from eotattn.priors import ForgettingPrior, split_parameters

__all__ = ["TrainingConfig", "learning_rate_factor", "parameter_groups", "split_by_rate"]


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that a training run depends on, apart from network and task.

    Args:
        steps: Optimiser steps.
        batch_size: Sequences a step, over all processes and parts.
        learning_rate: Peak rate of AdamW for the content.
        prior_learning_rate: Peak rate for log-priors, whose parameters are nats. They get no weight decay, which would
            pull a learned prior back to uniform.
        warmup_steps: Steps of linear warm-up; a cosine to a tenth of the peak follows.
        weight_decay: Decay of matrices, relative to the rate.
        gradient_clip: Largest gradient norm.
        clip_priors: Whether that norm is of all parameters together, or of the content alone and log-priors are free.
        seed: Seed of the batches.
        accumulation: Parts that the batch is computed in, for memory; processes share them. The step is the same.
        compile: Whether ``torch.compile`` compiles the network's training step; evaluation never is.
        precision: ``"no"`` (fp32) or ``"bf16"`` (autocast; weights stay fp32).
        log_every: Steps that one row of the loss averages over.
        evaluate_every: Steps between calls of the evaluation hook, which start before the first step; 0 calls it at
            the end alone.
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
    clip_priors: bool = True
    seed: int = 0
    accumulation: int = 1
    compile: bool = False
    precision: str = "no"
    log_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        owner = "TrainingConfig"
        for name in ("steps", "batch_size", "accumulation", "log_every"):
            check_positive_int(owner, name, getattr(self, name))
        for name in ("warmup_steps", "seed", "evaluate_every", "checkpoint_every"):
            check_positive_int(owner, name, getattr(self, name), minimum=0)
        for name in ("learning_rate", "prior_learning_rate", "gradient_clip"):
            check_positive(owner, name, getattr(self, name))
        check_positive(owner, "weight_decay", self.weight_decay, allow_zero=True)
        check_choice(owner, "precision", self.precision, ("no", "bf16"))
        fits = self.warmup_steps < self.steps
        require(fits, owner, "warmup_steps", f"be below steps = {self.steps}", self.warmup_steps, "Train for longer")

    def at(self, rate: float, *, seed: int, prior_rate_factor: float = 1.0) -> TrainingConfig:
        """The same run with another seed and other rates, that of log-priors as a multiple of that of the content.

        Example:
            >>> TrainingConfig(steps=10, batch_size=4).at(0.5, seed=1, prior_rate_factor=10).prior_learning_rate
            5.0
        """
        return replace(self, seed=seed, learning_rate=rate, prior_learning_rate=rate * prior_rate_factor)


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


def split_by_rate(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters at the rate of the content, and those of log-priors and sinks, which are nats.

    Forgetting gates are projections of the tokens, so they go with the content.
    """
    content, priors = split_parameters(network)
    gates = _ids(network, ForgettingPrior) & {id(p) for p in priors}
    nats = {id(p) for p in priors} - gates | _ids(network, AttentionSinks)
    trainable = [*content, *priors]
    return [p for p in trainable if id(p) not in nats], [p for p in trainable if id(p) in nats]


def _ids(network: nn.Module, kind: type[nn.Module]) -> set[int]:
    """Of the parameters of all parts of a kind."""
    return {id(p) for module in network.modules() if isinstance(module, kind) for p in module.parameters()}


def parameter_groups(network: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Matrices with decay, vectors without, log-priors at their own rate; frozen parameters in none.

    Log-priors have no decay, but for those whose class says ``weight_decays``.
    """
    content, of_priors = split_by_rate(network)
    matrices, vectors = [p for p in content if p.dim() >= 2], [p for p in content if p.dim() < 2]
    decaying = {id(p) for m in network.modules() if getattr(m, "weight_decays", False) for p in m.parameters()}
    priors = [p for p in of_priors if id(p) not in decaying]
    decaying_priors = [p for p in of_priors if id(p) in decaying]
    groups = [
        {"params": matrices, "peak": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": vectors, "peak": config.learning_rate, "weight_decay": 0.0},
        {"params": priors, "peak": config.prior_learning_rate, "weight_decay": 0.0},
        {"params": decaying_priors, "peak": config.prior_learning_rate, "weight_decay": config.weight_decay},
    ]
    return [group for group in groups if group["params"]]
