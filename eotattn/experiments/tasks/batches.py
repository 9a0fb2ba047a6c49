"""What a task hands to training: a batch that depends on nothing but a seed and a step.

Because a batch carries no hidden state, a run that resumes at step n sees exactly the batches that it would have seen.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["IGNORED", "Batch", "step_generator"]

#: Target of a token that no loss is taken on.
IGNORED = -100


class Batch(NamedTuple):
    """Tokens and what should follow each of them.

    Attributes:
        inputs: (B, L) int64 tokens.
        targets: (B, L) int64; ``targets[:, i]`` is the token after ``inputs[:, i]``, or :data:`IGNORED`.
    """

    inputs: Tensor
    targets: Tensor


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator that depends only on ``seed`` and ``step``.

    torch's CPU generator reads the low 32 bits of its seed alone, so the pair is hashed into them: streams of different
    seeds have nothing in common but, among some ten thousand steps, a rare accidental batch.

    Example:
        >>> one, again = (torch.rand(3, generator=step_generator(0, 7)) for _ in range(2))
        >>> torch.equal(one, again)
        True
    """
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
