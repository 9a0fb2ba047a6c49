"""Recognise the mask functions of Hugging Face transformers: causal, and causal within a window.

The library composes closures. A function is recognised if it is built from the same code with the same contents as the
one that the library makes when asked for that pattern; any other stays a function of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

__all__ = ["causal_window"]


def causal_window(function: Callable[..., Any]) -> int | None:
    """Find the window of a causal sliding-window mask function, tokens; ``None`` if it is not one.

    Example:
        >>> causal_window(lambda batch, head, query, key: key <= query) is None
        True
    """
    from transformers.masking_utils import sliding_window_causal_mask_function

    made = (size for size in _numbers(function) if _alike(function, sliding_window_causal_mask_function(size)))
    return next(made, None)


def _numbers(value: Any) -> Iterator[int]:
    """Whole numbers that a function, or one within it, closes over."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    for part in _parts(value):
        yield from _numbers(part)


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        if one.__code__ is not other.__code__ or one.__defaults__ != other.__defaults__:
            return False
    elif not (isinstance(one, tuple) and isinstance(other, tuple)):
        return type(one) is type(other) and bool(one == other)
    parts, others = _parts(one), _parts(other)
    return len(parts) == len(others) and all(_alike(a, b) for a, b in zip(parts, others, strict=True))


def _parts(value: Any) -> tuple[Any, ...]:
    """Entries of a tuple, and what a function closes over."""
    if isinstance(value, tuple):
        return value
    cells = value.__closure__ if isinstance(value, FunctionType) else None
    return tuple(cell.cell_contents for cell in cells or ())
