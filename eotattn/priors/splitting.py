"""Numbers as sums of numbers of a kernel's dtype, *pieces*: what one 16-bit number is too short for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eotattn.compat import allows_tf32

__all__ = ["MOST_PIECES", "multiply", "significant_digits", "split_numbers", "unit_roundoff", "write_pieces"]

#: Pieces of a factor at most: three numbers of bfloat16 hold all 24 digits of the float32 accumulator.
MOST_PIECES = 3


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to ``dtype``: 2^-8 in bfloat16, 2^-11 in float16."""
    return torch.finfo(dtype).eps / 2


def significant_digits(dtype: torch.dtype) -> int:
    """Binary digits of a number of ``dtype``; whole numbers of as many are exact."""
    return -math.frexp(unit_roundoff(dtype))[1] + 1


def split_numbers(value: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Write ``value`` as a sum of ``count`` tensors of ``dtype``, largest first."""
    pieces = [value.to(dtype)]
    rest = value
    for _ in range(count - 1):
        rest = rest - pieces[-1].to(rest.dtype)
        pieces.append(rest.to(dtype))
    return pieces


def write_pieces(value: Tensor, piece: Tensor, depth: int, dtype: torch.dtype) -> Tensor:
    """Piece number ``piece`` (P,) of ``value`` (..., P); derivatives are those of the leading pieces.

    The corrections are differences that cancel, so the leading piece carries the whole derivative.
    """
    lanes = value.to(dtype)
    if depth > 1:
        for number, rest in enumerate(split_numbers(value.detach(), dtype, depth)[1:], start=1):
            lanes = torch.where(piece == number, rest, lanes)
    return lanes


def multiply(table: Tensor, matrix: Tensor) -> Tensor:
    """The product of a table and the matrix of every head, exact whatever precision the user allows such products."""
    if table.device.type == "cuda" and table.dtype == torch.float32 and allows_tf32():
        return multiply(table.double(), matrix.double()).float()
    if table.dim() > 2:
        return table.unsqueeze(-3) @ matrix
    by_token = table @ matrix.transpose(0, 1).flatten(1)  # one product for all heads
    return by_token.view(table.shape[0], matrix.shape[0], matrix.shape[2]).transpose(0, 1)
