"""Records: tables, and where numbers come from, written whole or not at all."""

from __future__ import annotations

import csv
import html
import importlib.metadata
import io
import math
import os
import platform
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from eotattn.checks import check_installed, fail, require

__all__ = ["Table", "check_writable", "git_state", "library_versions", "provenance", "table_bytes", "write_atomically"]

#: Libraries whose versions can change a result.
LIBRARIES = (
    "eotattn",
    "torch",
    "numpy",
    "POT",
    "matplotlib",
    "accelerate",
    "papermill",
    "pandas",
    "transformers",
    "triton",
    "goat-attention",
    "flash-sinkhorn",
    "ott-jax",
    "jax",
)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or an interruption, finds the old content or the new one, never a part.

    Args:
        path: Target; its folder must exist.
        content: The whole file.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(owner: str, folder: Path, *, given: str | Path) -> None:
    """Raise, before any work, unless files can be made in a folder, or in the nearest one above it that exists.

    Args:
        owner: Who asks.
        folder: Where files will be.
        given: What the user wrote.
    """
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        probe = place / f".{uuid.uuid4().hex[:8]}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        got = f"{str(given)[:200]} ({error.strerror})"
        fail(owner, "out", "be a folder that can be written", got, "Choose another folder")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a result; those not installed are ``"absent"``."""
    return {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def git_state(folder: Path | None = None) -> dict[str, str | bool | None]:
    """Commit of the checkout that the package runs from.

    Args:
        folder: Package folder; by default that of ``eotattn``.

    Returns:
        ``{"commit": ..., "dirty": ...}``; dirty says whether the package's own files differ from the commit. The
        variable ``EOTATTN_COMMIT`` of the environment, where it is set, says the commit of a copy whose checkout lags
        behind; then, and outside a checkout, dirty is ``None``, and the commit ``"unknown"`` if nothing says it.
    """
    if "EOTATTN_COMMIT" in os.environ:
        return {"commit": os.environ["EOTATTN_COMMIT"], "dirty": None}
    folder = Path(__file__).resolve().parent if folder is None else folder

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": None}


def provenance(
    *, command: str, configuration: Any, seeds: Sequence[int], device: str, wall_seconds: float
) -> dict[str, Any]:
    """Everything that is needed to get a result again, and when it was got; holds no path of this machine.

    Args:
        command: The shell command that makes the result, relative to a clone.
        configuration: The recipe, a dataclass.
        seeds: Seeds of the runs behind it.
        device: Kind of device, e.g. ``"cpu"``.
        wall_seconds: Time that training and evaluation took.

    Returns:
        A dict that JSON can hold.

    Raises:
        TypeError: If ``configuration`` is no dataclass.
    """
    is_recipe = is_dataclass(configuration) and not isinstance(configuration, type)
    remedy = "Pass the recipe that was run"
    require(is_recipe, "provenance", "configuration", "be a dataclass", configuration, remedy, error=TypeError)
    return {
        "command": command,
        "configuration": asdict(configuration),
        "seed": list(seeds),
        **git_state(),
        "versions": library_versions(),
        "device": device,
        "processor": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cudnn": torch.backends.cudnn.version() if device.startswith("cuda") else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "wall_seconds": round(wall_seconds, 2),
    }


def table_bytes(rows: Sequence[dict[str, Any]]) -> bytes:
    """A tidy table as CSV, one row a measurement; columns come in order of first appearance.

    Example:
        >>> print(table_bytes([{"length": 128, "value": 1.5}]).decode().strip())
        length,value
        128,1.5
    """
    require(len(rows) > 0, "table_bytes", "rows", "hold at least one row", rows, "Measure something")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _rounded(value) for name, value in row.items()} for row in rows)
    return text.getvalue().encode()


def _rounded(value: Any) -> Any:
    """Floats with seven significant digits: all that fp32 has."""
    return f"{value:.7g}" if isinstance(value, float) else value


class Table:
    """What a report of columns can do: become a data frame, and show itself in a notebook."""

    #: Rows that a notebook shows.
    shown_rows = 40

    def to_dict(self) -> Mapping[str, Any]:
        """Arrays by name."""
        raise NotImplementedError

    def columns(self) -> Mapping[str, Any]:
        """Column -> its values, one row a measurement, all of one length; what :meth:`to_dict` returns by default."""
        return self.to_dict()

    def to_frame(self) -> Any:
        """The columns as a :class:`pandas.DataFrame`.

        Raises:
            ModuleNotFoundError: Without pandas.

        Example:
            >>> class Squares(Table):
            ...     def to_dict(self):
            ...         return {"x": [1, 2], "square": [1.0, 4.0]}
            >>> Squares().to_frame()["square"].tolist()
            [1.0, 4.0]
        """
        check_installed(type(self).__name__, "analysis", "pandas")
        from pandas import DataFrame

        return DataFrame({name: list(values) for name, values in self.columns().items()})

    def _repr_html_(self) -> str:
        """The first rows, and how many there are."""
        columns = {name: list(values) for name, values in self.columns().items()}
        rows = list(zip(*columns.values(), strict=True))
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_shown(value))}</td>" for value in row) + "</tr>"
            for row in rows[: self.shown_rows]
        )
        more = f"<p>The first {self.shown_rows} of {len(rows)} rows.</p>" if len(rows) > self.shown_rows else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _shown(value: Any) -> str:
    """Four digits of a number, nothing for one that does not exist."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)
