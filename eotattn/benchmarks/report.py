"""Reports: a suite's rows as a printed table, and as tidy files with where they come from."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from eotattn.benchmarks.suites import SUITES, Configuration
from eotattn.benchmarks.timing import Row
from eotattn.checks import check_choice

__all__ = ["bench", "format_table", "write"]

LIBRARIES = ("eotattn", "torch", "triton", "numpy", "goat-attention")


def bench(suite: str, config: Configuration, *, out: str | None = None) -> str:
    """Run one suite and return its table; with ``out`` also write ``bench_<suite>`` files there.

    Args:
        suite: A name in :data:`~eotattn.benchmarks.suites.SUITES`.
        config: How to run it.
        out: Folder for ``.csv`` and ``.json``.
    """
    check_choice("bench", "suite", suite, tuple(SUITES))
    torch.manual_seed(config.seed)
    start = datetime.now(timezone.utc)
    rows = SUITES[suite](config)
    seconds = (datetime.now(timezone.utc) - start).total_seconds()
    if out is not None:
        write(Path(out), suite, rows, config, seconds)
    return format_table(rows)


def format_table(rows: Sequence[Row]) -> str:
    """Rows as aligned text, one column a key in order of first appearance, the name last."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "name"))
    columns = [*columns, "name"]
    cells = [columns, *([_shown(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[c]) for line in cells) for c in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def write(folder: Path, suite: str, rows: Sequence[Row], config: Configuration, seconds: float) -> None:
    """Write ``bench_<suite>.csv`` (tidy) and ``bench_<suite>.json`` (provenance) into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / f"bench_{suite}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    record = json.dumps(_provenance(suite, config, seconds), indent=2)
    (folder / f"bench_{suite}.json").write_text(record + "\n")


def _provenance(suite: str, config: Configuration, seconds: float) -> dict[str, Any]:
    on_gpu = torch.device(config.device).type == "cuda"
    flags = f"--device {config.device} --dtype {config.dtype} --sizes {config.sizes} --rounds {config.rounds}"
    return {
        "command": f"eotattn bench {suite} {flags}",
        "configuration": asdict(config),
        "seed": config.seed,
        "commit": os.environ.get("EOTATTN_COMMIT") or _commit(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "libraries": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "wall_seconds": round(seconds, 1),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
