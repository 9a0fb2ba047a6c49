"""Which part of the data a run may read: test data are closed to whatever chooses something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["ClosedDataError", "check_open", "closed_data"]

_CLOSED = ContextVar("test data are closed", default=False)


class ClosedDataError(RuntimeError):
    """Something that chooses asked for test data."""


@contextmanager
def closed_data(closed: bool = True) -> Iterator[None]:
    """Within it every task refuses to hand out test data, if ``closed``.

    Example:
        >>> with closed_data():
        ...     check_open("LanguageTask.held_out_windows")
        Traceback (most recent call last):
        ...
        eotattn.experiments.tasks.parts.ClosedDataError: LanguageTask.held_out_windows: test data must not be read ...
    """
    before = _CLOSED.set(closed)
    try:
        yield
    finally:
        _CLOSED.reset(before)


def check_open(owner: str) -> None:
    """Raise within :func:`closed_data`; called by whoever hands out test data."""
    if _CLOSED.get():
        message = f"{owner}: test data must not be read by a run that chooses. Read them in the run that it is for."
        raise ClosedDataError(message)
