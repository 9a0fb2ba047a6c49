"""What the suites share: random content, priors as training leaves them, timings where the configuration says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.timing import Candidate, Row, measure
from eotattn.priors import LogPrior, RecencyPrior, SinkPrior

__all__ = ["content", "gpt_prior", "measured", "output_of", "trained"]


def trained(prior: LogPrior, config: Configuration, *, size: float = 0.5) -> LogPrior:
    """The prior away from its start, as training leaves it; slopes stay at least a tenth of ALiBi's."""
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            step = size * torch.randn(parameter.shape, generator=generator)
            parameter.copy_((parameter + step).clamp(min=0.1) if name.endswith("strength") else parameter + step)
    return prior.to(config.place["device"])


def gpt_prior(num_heads: int) -> LogPrior:
    """Recency and sink: what the reference package's GPT factory has."""
    return RecencyPrior(num_heads) + SinkPrior(num_heads)


def content(config: Configuration, *shape: int) -> Tensor:
    """Normal numbers that a gradient is wanted for; equal shapes give equal numbers."""
    generator = torch.Generator().manual_seed(config.seed + sum(shape))
    return torch.randn(shape, generator=generator).to(**config.place).requires_grad_()


def output_of(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What attention returns first."""
    return result[0] if isinstance(result, tuple) else result


def measured(candidates: Sequence[Candidate], config: Configuration) -> list[Row]:
    """Time the candidates where and as often as the configuration says."""
    return measure(candidates, device=torch.device(config.device), rounds=config.rounds)
