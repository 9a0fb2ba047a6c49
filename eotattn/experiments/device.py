"""The device on which this process trains, and the processes that train together."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState

from eotattn.processes import num_processes

__all__ = ["PATIENCE", "join_processes", "leave_processes", "training_device", "training_device_name"]

#: How long a process waits for a message of another one before it ends with an error.
PATIENCE = timedelta(minutes=10)


def training_device() -> torch.device:
    """The current GPU where there is one, else the CPU; accelerate's variable ``ACCELERATE_USE_CPU=true`` says the CPU.

    Log-priors compute positions in float64, which Apple's GPUs lack: without CUDA, training takes the CPU.
    """
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    return torch.device("cpu" if wants_cpu or not torch.cuda.is_available() else "cuda")


def training_device_name() -> str:
    """Name of that device, as records have it, and how many of them train together."""
    device, count = training_device(), num_processes()
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    return name if count == 1 else f"{count} x {name}"


def join_processes() -> None:
    """Connect to the processes that a launcher started beside this one, and take this one's GPU; once is enough.

    A process that waits for one that was killed ends with an error: at once over gloo, which sees the connection close,
    after :data:`PATIENCE` over NCCL, unless its launcher ends it before, as torchrun does within half a minute.
    """
    if num_processes() > 1:
        PartialState(cpu=training_device().type == "cpu", timeout=PATIENCE)


def leave_processes() -> None:
    """Part from them for good, when no message is on its way any more."""
    if num_processes() > 1:
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
