"""Running sums that compiled graphs leave to one operator: compilers make scans of them, which fail in PyTorch 2.11."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["cumulative_sums"]


def cumulative_sums(x: Tensor) -> Tensor:
    """Running sums along the last axis, in the dtype of ``x``."""
    return _opaque_sums(x) if torch.compiler.is_compiling() else x.cumsum(-1, dtype=x.dtype)


@torch.library.custom_op("eotattn::running_sums", mutates_args=(), schema="(Tensor x) -> Tensor")
def _opaque_sums(x: Tensor) -> Tensor:
    """The sums, as graphs call them: forward, and backward from behind."""
    return x.cumsum(-1, dtype=x.dtype)


@_opaque_sums.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _sums_from_behind(ctx: Any, grad: Tensor) -> Tensor:
    return _opaque_sums(grad.flip(-1)).flip(-1)


_opaque_sums.register_autograd(_sums_from_behind)
