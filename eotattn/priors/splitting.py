"""Numbers as sums of numbers of a kernel's dtype, *pieces*: what one 16-bit number is too short for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eotattn.compat import allows_tf32

__all__ = [
    "KERNEL_DTYPES",
    "MOST_PIECES",
    "computing_dtype",
    "multiply",
    "significant_digits",
    "split_numbers",
    "unit_roundoff",
    "write_pieces",
]

#: Number formats that lanes can be written in.
KERNEL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Pieces of a factor at most: three numbers of bfloat16 hold all 24 digits of the float32 accumulator.
MOST_PIECES = 3


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a prior computes for a kernel of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
        return (table.double().unsqueeze(-3) @ matrix.double()).float()
    return table.unsqueeze(-3) @ matrix
