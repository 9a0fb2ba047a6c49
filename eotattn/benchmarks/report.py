"""Reports: a suite's rows as a printed table, and as tidy files with where they come from."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

import torch

from eotattn.benchmarks.suites import SUITES, Configuration
from eotattn.benchmarks.timing import Row, reason
from eotattn.checks import check_choice, check_installed, speaking_as
from eotattn.provenance import check_writable, provenance, table_bytes, write_atomically

__all__ = ["BenchTable", "bench", "combine", "format_table", "write"]


@dataclass(frozen=True)
class BenchTable:
    """What a suite measured; prints as a table.

    Args:
        rows: One a candidate and size.
        is_complete: Whether the suite was run to its end.
        failure: The error that ended it, if one did.
    """

    rows: tuple[Row, ...]
    is_complete: bool = True
    failure: str | None = None

    def __str__(self) -> str:
        return format_table(self.rows)

    def to_frame(self) -> Any:
        """The rows as a :class:`pandas.DataFrame`.

        Raises:
            ModuleNotFoundError: Without pandas.
        """
        check_installed("BenchTable.to_frame", "experiments", "pandas")
        import pandas

        return pandas.DataFrame(list(self.rows))

    def _repr_html_(self) -> str:
        """The table in a notebook; needs no pandas."""
        columns, *lines = table_cells(self.rows)
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


@speaking_as("bench")
def bench(suite: str, config: Configuration, *, out: str | Path | None = None) -> BenchTable:
    """Run one suite; with ``out`` also write ``bench_<suite>`` files there.

    Args:
        suite: A name in :data:`~eotattn.benchmarks.suites.SUITES`.
        config: How to run it.
        out: Folder for ``.csv`` and ``.json``; files of a suite that was run to its end before are replaced by such.

    Returns:
        The table. An interruption (Ctrl-C) ends the run and keeps the rows that were measured, unwritten. An error
        after the first row (a GPU that fails takes all that follows with it) ends it with a row that says why.

    Raises:
        ValueError: Before any work, for an unknown suite, a folder that cannot be written, or a dtype that the suite
            lacks.
        Exception: Likewise what the suite raises, Ctrl-C included, if no row was measured.
    """
    check_choice("bench", "suite", suite, tuple(SUITES))
    if out is not None:
        check_writable("bench", Path(out), given=out)
    torch.manual_seed(config.seed)
    start, device = datetime.now(timezone.utc), _device_name(config.device)
    rows: list[Row] = []
    failure = None
    try:
        for row in SUITES[suite](config):
            rows.append(row)  # noqa: PERF402  (an interruption keeps what is there)
    except KeyboardInterrupt:
        if not rows:
            raise
        return BenchTable(tuple(rows), is_complete=False)
    except Exception as error:
        if not rows:
            raise
        failure = reason(error)
        rows.append({"name": "eotattn", "failure": failure})
    seconds = (datetime.now(timezone.utc) - start).total_seconds()
    if out is not None:
        write(Path(out), suite, rows, config, seconds, device)
    return BenchTable(tuple(rows), failure is None, failure)


def table_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Names of the columns, then a line a row, as they are shown."""
    columns = [*dict.fromkeys(key for row in rows for key in row if key != "name"), "name"]
    return [columns, *([_shown(row.get(column)) for column in columns] for row in rows)]


def format_table(rows: Sequence[Row]) -> str:
    """Rows as aligned text, one column a key in order of first appearance, the name last."""
    cells = table_cells(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def write(folder: Path, suite: str, rows: Sequence[Row], config: Configuration, seconds: float, device: str) -> None:
    """Write ``bench_<suite>.csv`` (tidy) and ``bench_<suite>.json`` (provenance) into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = f"--device {config.device} --dtype {config.dtype} --sizes {config.sizes} --rounds {config.rounds}"
    record = provenance(
        command=f"eotattn bench {suite} {flags}",
        configuration=config,
        seeds=[config.seed],
        device=device,
        wall_seconds=seconds,
    )
    write_atomically(folder / f"bench_{suite}.csv", table_bytes(rows))
    write_atomically(folder / f"bench_{suite}.json", (json.dumps(record, indent=2) + "\n").encode())


def combine(folder: Path, name: str, tables: Sequence[Path]) -> None:
    """Write what one figure is drawn from under the figure's name: the rows of several suites, and their provenance.

    Args:
        folder: Where the figure lies.
        name: Name of the figure.
        tables: The ``bench_<suite>.csv``, each with its ``.json`` beside it.
    """
    rows: list[dict[str, Any]] = []
    records: dict[str, dict[str, Any]] = {}
    for table in tables:
        suite = table.stem.removeprefix("bench_")
        with table.open(newline="") as file:
            rows += [{"suite": suite, **row} for row in csv.DictReader(file)]
        records[suite] = json.loads(table.with_suffix(".json").read_text())
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
