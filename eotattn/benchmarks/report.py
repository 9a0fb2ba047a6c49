"""Reports: a suite's rows as a printed table, and as tidy files with where they come from."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from eotattn.benchmarks.suites import SUITES, Configuration
from eotattn.benchmarks.timing import Row
from eotattn.checks import check_choice
from eotattn.provenance import provenance, table_bytes, write_atomically

__all__ = ["bench", "combine", "format_table", "write"]


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
    flags = f"--device {config.device} --dtype {config.dtype} --sizes {config.sizes} --rounds {config.rounds}"
    record = provenance(
        command=f"eotattn bench {suite} {flags}",
        configuration=config,
        seeds=[config.seed],
        device=_device_name(config.device),
        wall_seconds=seconds,
    )
    write_atomically(folder / f"bench_{suite}.csv", table_bytes(rows))
    write_atomically(folder / f"bench_{suite}.json", (json.dumps(record, indent=2) + "\n").encode())


def combine(folder: Path, name: str, suites: Sequence[str]) -> None:
    """Write what one figure is drawn from under the figure's name: the rows of several suites, and their provenance.

    Args:
        folder: Where ``bench_<suite>.csv`` and ``.json`` lie.
        name: Name of the figure.
        suites: Names of suites that were run.
    """
    rows: list[dict[str, Any]] = []
    for suite in suites:
        with (folder / f"bench_{suite}.csv").open(newline="") as file:
            rows += [{"suite": suite, **row} for row in csv.DictReader(file)]
    records = {suite: json.loads((folder / f"bench_{suite}.json").read_text()) for suite in suites}
    keys = dict.fromkeys(key for record in records.values() for key in record)
    record = {key: {suite: found.get(key) for suite, found in records.items()} for key in keys}
    write_atomically(folder / f"{name}.csv", table_bytes(rows))
    write_atomically(folder / f"{name}.json", (json.dumps(record, indent=2) + "\n").encode())


def _device_name(device: str) -> str:
    is_cuda = torch.device(device).type == "cuda"
    return f"cuda ({torch.cuda.get_device_name()})" if is_cuda else "cpu"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
