"""The device on which this process trains."""

from __future__ import annotations

import os

import torch

__all__ = ["training_device", "training_device_name"]


def training_device() -> torch.device:
    """The current GPU where there is one, else the CPU; accelerate's variable ``ACCELERATE_USE_CPU=true`` says the CPU.

    Log-priors compute positions in float64, which Apple's GPUs lack: without CUDA, training takes the CPU.
    """
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    return torch.device("cpu" if wants_cpu or not torch.cuda.is_available() else "cuda")


def training_device_name() -> str:
    """Name of that device, as records have it."""
    device = training_device()
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type
