"""Results: tidy tables, figures and provenance, written whole or not at all."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eotattn.checks import require
from eotattn.experiments.scales import check_scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ResultFolder", "git_state", "library_versions", "provenance", "write_atomically"]

#: Libraries whose versions can change a result.
LIBRARIES = ("eotattn", "torch", "numpy", "POT", "matplotlib", "accelerate", "papermill", "pandas")


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
        ``{"commit": ..., "dirty": ...}``; dirty says whether the package's own files differ from the commit. An
        installation outside a checkout gives ``"unknown"`` and ``None``.
    """
    folder = Path(__file__).resolve().parents[1] if folder is None else folder

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
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "wall_seconds": round(wall_seconds, 2),
    }


@dataclass(frozen=True)
class ResultFolder:
    """The folder ``<out>/<scale>/`` of a figure's files, all named after the figure.

    Args:
        out: Folder of all results; made if it is missing.
        scale: A name in :data:`eotattn.experiments.scales.SCALES`.
        figure: Name of the figure, e.g. ``"fig1_copy_mixture"``.

    Raises:
        ValueError: At construction, before any work, if the folder cannot be made or written.

    Example:
        >>> import tempfile
        >>> folder = ResultFolder(tempfile.mkdtemp(), "smoke", "fig1_copy_mixture")
        >>> folder.write_table([{"panel": "a", "value": 1.5}]).name
        'fig1_copy_mixture.csv'
    """

    out: str
    scale: str
    figure: str

    def __post_init__(self) -> None:
        check_scale("ResultFolder", self.scale)
        probe = self.path / f".{uuid.uuid4().hex[:8]}.probe"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            reason = f"{str(self.out)!r} ({error.strerror})"
            message = f"ResultFolder: out must be a folder that can be written; got {reason}. Choose another folder."
            raise ValueError(message) from error

    @property
    def path(self) -> Path:
        """``<out>/<scale>``."""
        return Path(self.out) / self.scale

    def write_table(self, rows: Sequence[dict[str, Any]]) -> Path:
        """Write a tidy table, one row a measurement; columns come in order of first appearance."""
        require(len(rows) > 0, "ResultFolder.write_table", "rows", "hold at least one row", rows, "Measure something")
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _rounded(value) for name, value in row.items()} for row in rows)
        return self._write(".csv", text.getvalue().encode())

    def write_provenance(self, record: dict[str, Any]) -> Path:
        """Write a record from :func:`provenance` as JSON."""
        return self._write(".json", (json.dumps(record, indent=2) + "\n").encode())

    def write_figure(self, figure: Figure) -> tuple[Path, Path]:
        """Write a figure as PNG (200 dots an inch) and PDF, without dates inside: equal figures are equal files."""
        paths = []
        for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
            content = io.BytesIO()
            figure.savefig(content, format=suffix[1:], dpi=200, metadata=metadata)
            paths.append(self._write(suffix, content.getvalue()))
        return paths[0], paths[1]

    def _write(self, suffix: str, content: bytes) -> Path:
        path = self.path / f"{self.figure}{suffix}"
        write_atomically(path, content)
        return path


def _rounded(value: Any) -> Any:
    """Floats with seven significant digits: all that fp32 has."""
    return f"{value:.7g}" if isinstance(value, float) else value
