"""The folder of an analysis: tidy tables, figures, one self-contained page; there as a whole or not at all."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

from eotattn.analysis.figures import figures
from eotattn.analysis.findings import details, findings
from eotattn.analysis.head_kinds import head_kinds
from eotattn.analysis.page import page
from eotattn.analysis.summary import Summary
from eotattn.analysis.tables import plain, tables
from eotattn.checks import require
from eotattn.plotting.files import to_png
from eotattn.provenance import check_writable, library_versions, table_bytes

__all__ = ["PAGE", "REPORT", "check_folder", "write_analysis", "write_files"]

#: Names that an analysis writes. The report lists all others; a folder that holds anything else is somebody else's.
REPORT, PAGE = "report.json", "report.html"


def check_folder(owner: str, folder: Path) -> Path:
    """Return where the folder really is; raise, before any work, unless an analysis can be put there.

    It must be new, empty, or hold an earlier analysis and nothing else; and it is replaced as a whole.
    """
    given, folder = folder, folder.resolve()
    check_writable(owner, folder.parent, given=given)  # it is made there under another name first
    check_writable(owner, folder, given=given)
    if not folder.exists():
        return folder
    fixed = folder.is_mount() or folder in (Path.cwd(), *Path.cwd().parents)
    remedy = "Name a folder inside it"
    require(not fixed, owner, "out", "be neither the current folder nor a mount", str(given), remedy)
    there = {path.name for path in folder.iterdir()}
    foreign = sorted(there - _files_of_report(folder))
    remedy = "Choose another folder"
    require(not foreign, owner, "out", "be empty or hold an earlier report and nothing else", foreign[:5], remedy)
    return folder


def _files_of_report(folder: Path) -> set[str]:
    """What an earlier analysis wrote here, by its own list."""
    try:
        record = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        return {REPORT, *record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def write_analysis(folder: Path, analysis: Summary) -> None:
    """Write tables, figures and the page of an analysis."""
    write_files("analyze", folder, _contents(analysis))


def write_files(owner: str, folder: Path, files: dict[str, bytes]) -> None:
    """Write files beside ``folder``, then put them there: an interruption leaves the old folder or the new one.

    ``report.json`` is one of them, and its "files" names the others.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        for name, content in files.items():
            (partial / name).write_bytes(content)
        _put(owner, partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(owner: str, partial: Path, folder: Path) -> None:
    """Replace ``folder`` by ``partial``; what was there is removed last."""
    check_folder(owner, folder)
    old = partial.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def _contents(analysis: Summary) -> dict[str, bytes]:
    """Every file by name."""
    files = {f"{name}.png": to_png(axes) for name, axes in figures(analysis)}
    files |= {f"{name}.csv": table_bytes(rows) for name, rows in tables(analysis).items() if rows}
    files[PAGE] = page(analysis).encode()
    record = _record(analysis) | {"files": sorted(files), "versions": library_versions()}
    files[REPORT] = (json.dumps(record, indent=2, allow_nan=False) + "\n").encode()
    return files


def _record(analysis: Summary) -> dict[str, Any]:
    heads = analysis.heads
    return {
        "model": analysis.subject.model,
        "date": analysis.subject.date,
        "findings": [*findings(analysis), *details(analysis)],
        "layers": list(heads.layers),
        "layer_numbers": list(heads.numbers),
        "heads": list(heads.heads),
        "num_texts": analysis.num_texts,
        "num_texts_given": analysis.num_given,
        "num_texts_cut": analysis.num_cut,
        "num_sequences": heads.num_sequences,
        "quantities": [
            {"name": q.name, "unit": q.unit, "formula": q.formula, "source": q.source} for q in heads.quantities
        ],
        "sink_rate": {str(t): plain(rate) for t, rate in heads.sink_rate.items()},
        "sink_rate_interval": {str(t): plain(ends) for t, ends in heads.sink_rate_interval.items()},
        "layer_interval": {name: plain(ends) for name, ends in heads.layer_interval.items()},
        **{
            part: {name: plain(grid) for name, grid in getattr(heads, part).items()} for part in ("mean", "low", "high")
        },
        "explained": plain(analysis.explained()),
        "prior_fails": analysis.fails().tolist(),
        "sink_kinds": analysis.sink_kinds(),
        "kinds": head_kinds(analysis),
        "massive_activations": analysis.residuals.massive_share(),
        "missing": analysis.needs,
    }
