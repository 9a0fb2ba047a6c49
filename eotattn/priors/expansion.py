"""Expansions: priors that are linear in their learned numbers, said so that a kernel can evaluate them.

Legend: H heads, L positions, F factors, S slots, N coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from eotattn.priors.positions import may_remember

__all__ = ["Expansion", "known_numbers"]

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Expansion:
    """Part of a log-prior as <query_i, key_j>, one side of it linear in learned numbers, the other side fixed.

    The learned side is factor_hlf = sum_s coefficient_h,sources[f][s] * learned_features_l,f,s; the other side is
    fixed_features_lf, the same for all heads. It says the same as :class:`~eotattn.priors.lanes.LaneFactors` (which
    defines the prior's lanes), without the numbers multiplied out.

    Args:
        name: Identifies the features: equal names, equal features.
        coefficients: Learned numbers, each (H,) or (H, n), n columns counted on from tensor to tensor.
        sources: (F, S) indices of coefficients.
        learned: The side that is learned.
        learned_features: Positions (L,) -> (L, F * S) float32.
        fixed_features: Positions (L,) -> (L, F) float32.
        scale: One factor a head on all coefficients.
        by_size: The size of a coefficient counts, not its sign.
        fixed_is_exact: Whether any kernel dtype represents the fixed side exactly.
        has_residual: Whether the last factor is one against zero, whose gradient is what score gradients of a row leave
            over instead of summing to zero. Gradients of the other factors are corrected by it: ``learned_features``
            then ends in F - 1 more columns, the fixed features at the learned side's own position.
    """

    name: Hashable
    coefficients: tuple[Tensor, ...]
    sources: tuple[tuple[int, ...], ...]
    learned: Literal["query", "key"]
    learned_features: Features
    fixed_features: Features
    scale: tuple[float, ...]
    by_size: bool = False
    fixed_is_exact: bool = False
    has_residual: bool = False


_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def known_numbers(tensor: Tensor) -> tuple[float, ...] | None:
    """The entries of a buffer as Python numbers, read once from the device and again whenever it changed.

    Returns:
        A flat tuple, or ``None`` where the numbers cannot be read or remembered (compilation, inference tensors, graph
        capture, wrapped tensors).
    """
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.is_inference():
        return None
    stamp = (tensor._version, tensor.data_ptr())
    held = _KNOWN.get(tensor)
    if held is None or held[0] != stamp:
        if not may_remember(tensor.device):
            return None
        held = (stamp, tuple(tensor.detach().flatten().tolist()))
        _KNOWN[tensor] = held
    return held[1]
