"""Results: the files of one figure, written whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eotattn.experiments.scales import ALL_SCALES, check_scale
from eotattn.provenance import check_writable, table_bytes, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ResultFolder"]


@dataclass(frozen=True)
class ResultFolder:
    """The folder ``<out>/<scale>/`` of a figure's files, all named after the figure.

    Args:
        out: Folder of all results; made if it is missing.
        scale: A name in :data:`eotattn.experiments.scales.ALL_SCALES`.
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
        check_scale("ResultFolder", self.scale, ALL_SCALES)
        check_writable("ResultFolder", self.path, given=self.out)
        self.path.mkdir(parents=True, exist_ok=True)

    @property
    def path(self) -> Path:
        """``<out>/<scale>``."""
        return Path(self.out) / self.scale

    def write_table(self, rows: Sequence[dict[str, Any]]) -> Path:
        """Write a tidy table, one row a measurement; columns come in order of first appearance."""
        return self._write(".csv", table_bytes(rows))

    def write_provenance(self, record: dict[str, Any]) -> Path:
        """Write a record from :func:`eotattn.provenance.provenance` as JSON."""
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
