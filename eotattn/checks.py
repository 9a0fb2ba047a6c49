"""Argument checks, and the one wording in which they fail.

Every error that a user can cause reads
``<owner>: <argument> must <rule>; got <value or shape>. <what to do>.``
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = [
    "called",
    "check_choice",
    "check_device",
    "check_floating",
    "check_indices",
    "check_installed",
    "check_no_nan",
    "check_positive",
    "check_positive_int",
    "check_probability",
    "check_same_device",
    "check_shape",
    "describe",
    "fail",
    "require",
    "speaking_as",
]

#: Characters of a value in a message.
LONGEST = 240

#: What the user called, where that is not the function that checks.
_CALLED: ContextVar[str | None] = ContextVar("called", default=None)


@contextmanager
def speaking_as(owner: str) -> Iterator[None]:
    """Let every check inside name ``owner``, which the user called; the outermost one counts. Also a decorator.

    Example:
        >>> with speaking_as("analyze"):
        ...     check_positive_int("read", "count", 0)
        Traceback (most recent call last):
        ...
        ValueError: analyze: count must be at least 1; got 0. Pass a whole number from 1 up.
    """
    token = _CALLED.set(_CALLED.get() or owner)
    try:
        yield
    finally:
        _CALLED.reset(token)


def called(owner: str) -> str:
    """What the user called: ``owner`` unless another function speaks for it."""
    if torch.compiler.is_compiling():  # which knows no context variables
        return owner
    return _CALLED.get() or owner


def require(
    condition: bool,
    owner: str,
    argument: str,
    rule: str,
    got: Any,
    remedy: str,
    *,
    error: type[Exception] = ValueError,
) -> None:
    """Raise ``error`` in the house's wording unless ``condition`` holds.

    Args:
        condition: What must be true.
        owner: The function or class that checks.
        argument: Name of the offending argument.
        rule: What the argument must do, e.g. ``"be positive"``.
        got: What was given; tensors are described by shape, dtype and device.
        remedy: What the user can do, without a full stop.
        error: Class of the exception.

    Raises:
        Exception: ``error``, if ``condition`` is false.

    Example:
        >>> require(False, "solve", "epsilon", "be positive", -1.0, "Pass a temperature above zero")
        Traceback (most recent call last):
        ...
        ValueError: solve: epsilon must be positive; got -1.0. Pass a temperature above zero.
    """
    if not condition:
        fail(owner, argument, rule, got, remedy, error=error)


def fail(
    owner: str, argument: str, rule: str, got: Any, remedy: str, *, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise ``error`` in the house's wording; for checks whose message is costly or sizes symbolic.

    Example:
        >>> fail("solve", "epsilon", "be positive", -1.0, "Pass a temperature above zero")
        Traceback (most recent call last):
        ...
        ValueError: solve: epsilon must be positive; got -1.0. Pass a temperature above zero.
    """
    raise error(f"{called(owner)}: {argument} must {rule}; got {describe(got)}. {remedy}.")


def describe(value: Any) -> str:
    """Say in a line what a value is: tensors by shape, dtype and device, the rest by ``repr``, cut where it is long.

    Example:
        >>> describe(torch.zeros(2, 3))
        'shape (2, 3), torch.float32, cpu'
    """
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}, {value.dtype}, {value.device}"
    if isinstance(value, torch.Size):
        return f"shape {tuple(value)}"
    text = " ".join(repr(value).split()) if "\n" in repr(value) else repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def check_positive_int(owner: str, argument: str, value: Any, *, minimum: int = 1) -> int:
    """Return ``value`` as an int, or raise unless it is an integer of at least ``minimum``."""
    is_int = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    require(is_int, owner, argument, "be an integer", value, f"Pass a whole number from {minimum} up", error=TypeError)
    require(
        value >= minimum, owner, argument, f"be at least {minimum}", value, f"Pass a whole number from {minimum} up"
    )
    return value


def check_indices(owner: str, argument: str, indices: Sequence[int], count: int, *, where: str = "") -> list[int]:
    """Return ``indices`` as a list, or raise unless they are different whole numbers from 0 to ``count`` - 1."""
    is_list = isinstance(indices, Sequence) and not isinstance(indices, str)
    remedy = "Put it into a list, or pass None for all"
    require(is_list, owner, argument, "be a list of whole numbers", indices, remedy, error=TypeError)
    given = list(indices)
    known = all(isinstance(index, int) and not isinstance(index, bool) and 0 <= index < count for index in given)
    rule = f"name {argument} from 0 to {count - 1}{where}"
    require(known, owner, argument, rule, given, f"Choose {argument} that are there")
    once = 0 < len(given) == len(set(given))
    require(once, owner, argument, "name at least one, and each once", given, "Pass None for all")
    return given


def check_positive(
    owner: str, argument: str, value: Any, *, allow_zero: bool = False, allow_inf: bool = False
) -> float:
    """Return ``value`` as a float, or raise unless it is a number in the stated range."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(is_number, owner, argument, "be a number", value, "Pass a Python float", error=TypeError)
    number = float(value)
    low = number >= 0 if allow_zero else number > 0
    high = number <= float("inf") if allow_inf else number < float("inf")
    rule = f"be {'non-negative' if allow_zero else 'positive'}{'' if allow_inf else ' and finite'}"
    require(low and high, owner, argument, rule, value, "Choose a value in that range")
    return number


def check_probability(owner: str, argument: str, value: Any) -> float:
    """Return ``value`` as a float, or raise unless it is a number in [0, 1)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(is_number, owner, argument, "be a number", value, "Pass a Python float", error=TypeError)
    require(0 <= value < 1, owner, argument, "lie in [0, 1)", value, "Pass a probability")
    return float(value)


def check_choice(owner: str, argument: str, value: Any, choices: Sequence[str]) -> str:
    """Return ``value``, or raise unless it is one of ``choices``."""
    listed = ", ".join(repr(choice) for choice in choices)
    require(value in choices, owner, argument, f"be one of {listed}", value, "Choose one of these names")
    return value


def check_floating(owner: str, argument: str, value: Any) -> Tensor:
    """Return ``value``, or raise unless it is a tensor of a floating dtype."""
    if isinstance(value, Tensor) and value.is_floating_point():  # at once: every call asks
        return value
    remedy = "Convert it, e.g. with torch.as_tensor(..., dtype=torch.float32)"
    require(isinstance(value, Tensor), owner, argument, "be a tensor", type(value), remedy, error=TypeError)
    require(value.is_floating_point(), owner, argument, "have a floating dtype", value, remedy, error=TypeError)
    return value


def check_shape(owner: str, argument: str, value: Tensor, shape: Sequence[int | None], remedy: str) -> None:
    """Raise unless ``value`` has exactly ``shape``; ``None`` stands for any size."""
    fits = value.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join("any" if want is None else str(want) for want in shape) + ")"
        fail(owner, argument, f"have shape {wanted}", value, remedy)


def check_same_device(owner: str, reference: tuple[str, Tensor], **others: Tensor | None) -> None:
    """Raise unless every given tensor lives on the device of ``reference``, a pair (name, tensor)."""
    name, tensor = reference
    for argument, value in others.items():
        if value is not None and value.device != tensor.device:
            rule = f"be on the device of {name} ({tensor.device})"
            fail(owner, argument, rule, value, f"Move it with .to({name}.device)")


def check_device(owner: str, argument: str, value: torch.device | str) -> torch.device:
    """Return ``value`` as a device, or raise unless this machine has it.

    Example:
        >>> check_device("capture", "device", "cpu")
        device(type='cpu')
    """
    remedy = "Pass e.g. 'cpu' or, where there is a GPU, 'cuda'"
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(owner, argument, "be a device of this machine", str(value), remedy)
    return device


def check_installed(owner: str, extra: str, *libraries: str) -> None:
    """Raise ModuleNotFoundError, naming the extra, unless all libraries are installed.

    Example:
        >>> check_installed("analyze", "analysis", "no_such_library")
        Traceback (most recent call last):
        ...
        ModuleNotFoundError: analyze: no_such_library must be installed; got none. Run pip install 'eotattn[analysis]'.
    """
    absent = [library for library in libraries if importlib.util.find_spec(library) is None]
    if absent:
        message = f"{' and '.join(absent)} must be installed; got none. Run pip install 'eotattn[{extra}]'."
        raise ModuleNotFoundError(f"{called(owner)}: {message}")


def check_no_nan(owner: str, argument: str, value: Tensor, *, allow_negative_inf: bool = False) -> None:
    """Raise if ``value`` holds NaN or infinity; -inf passes where it means an inadmissible pair."""
    bad = value.isnan() | (value == float("inf"))
    if not allow_negative_inf:
        bad = bad | (value == float("-inf"))
    if bool(bad.any()):
        count = int(bad.sum())
        rule = "hold no NaN and no +inf" if allow_negative_inf else "be finite"
        require(False, owner, argument, rule, f"{count} such entries of {value.numel()}", "Clean the input first")
