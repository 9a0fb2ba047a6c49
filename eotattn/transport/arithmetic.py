"""Arithmetic that autocast leaves alone, forward and backward: transport states its precision itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["full_precision", "product", "solve_symmetric"]


def full_precision(tensor: Tensor) -> torch.autocast:
    """The context in which operations on the device of ``tensor`` keep their dtype."""
    return torch.autocast(tensor.device.type, enabled=False)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product in the dtype of its operands, shape (..., a, c), also where autocast meets the backward pass."""
    result: Tensor = _Product.apply(left, right)
    return result


class _Product(torch.autograd.Function):
    """The product; its derivatives are products too, so it may be differentiated any number of times."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        with full_precision(left):
            return left @ right

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        wants_left, wants_right = ctx.needs_input_grad
        above = cotangents[0]
        return (
            product(above, right.mT).sum_to_size(left.shape) if wants_left else None,
            product(left.mT, above).sum_to_size(right.shape) if wants_right else None,
        )


def solve_symmetric(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve symmetric systems of shapes (..., m, m) and (..., m), as ``product`` does its work."""
    result: Tensor = _Solution.apply(matrix, right)
    return result


class _Solution(torch.autograd.Function):
    """The solution; its derivative is a system with the same matrix."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, right: Tensor) -> Tensor:
        with full_precision(right):
            solution = torch.linalg.solve(matrix, right.unsqueeze(-1)).squeeze(-1)
        ctx.save_for_backward(matrix, solution)
        return solution

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor]:
        matrix, solution = ctx.saved_tensors
        adjoint = solve_symmetric(matrix, cotangents[0])
        return -adjoint[..., :, None] * solution[..., None, :], adjoint
