"""How a suite is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eotattn.checks import check_choice, check_device, check_positive_int

__all__ = ["Configuration", "configure"]


@dataclass(frozen=True)
class Configuration:
    """How a suite is run.

    Args:
        device: Where.
        dtype: Name of the dtype of content.
        sizes: ``"small"`` (seconds on a CPU) or ``"full"`` (the project's bounds, on a GPU).
        rounds: Timed calls of each candidate.
        seed: Seed of all random numbers.
    """

    device: str = "cpu"
    dtype: str = "float32"
    sizes: str = "small"
    rounds: int = 20
    seed: int = 0

    @property
    def place(self) -> dict[str, Any]:
        """Keywords that put a tensor there."""
        return {"device": torch.device(self.device), "dtype": getattr(torch, self.dtype)}

    def pick(self, small: Sequence[Any], full: Sequence[Any]) -> Sequence[Any]:
        """The sizes to run."""
        return small if self.sizes == "small" else full


def configure(device: str, dtype: str, sizes: str, rounds: int, seed: int = 0) -> Configuration:
    """Check and make a :class:`Configuration`."""
    check_choice("bench", "dtype", dtype, ("float32", "bfloat16", "float16"))
    check_choice("bench", "sizes", sizes, ("small", "full"))
    check_device("bench", "device", device)
    check_positive_int("bench", "rounds", rounds)
    return Configuration(device, dtype, sizes, rounds, seed)
