"""The record of one run: what it measured and where that comes from, as JSON, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from eotattn.checks import require
from eotattn.experiments.device import training_device, training_device_name
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.tasks.parts import closed_data
from eotattn.processes import is_first_process
from eotattn.provenance import provenance, write_atomically

__all__ = [
    "Configuration",
    "Measurement",
    "Record",
    "Records",
    "Row",
    "Run",
    "RunFolder",
    "TrainedRun",
    "make",
    "merged_provenance",
    "taken_from",
]

#: One measurement: column name -> value that JSON can hold.
Row = dict[str, Any]


class Configuration(Protocol):
    """A frozen dataclass: everything that a run's result depends on."""

    @property
    def seed(self) -> int:
        """Seed of weights and batches."""
        ...


class TrainedRun:
    """What configurations of runs that train share: the seed is that of their ``training``."""

    training: Any

    @property
    def seed(self) -> int:
        """Seed of weights and batches."""
        seed: int = self.training.seed
        return seed


C = TypeVar("C")


def taken_from(recipe: Any, kind: type[C], **own: Any) -> C:
    """A configuration of a run: its own fields, and the others as the recipe has them by the same name."""
    names = [field.name for field in fields(kind) if field.name not in own]  # type: ignore[arg-type]
    return kind(**{name: getattr(recipe, name) for name in names}, **own)


@dataclass(frozen=True)
class Measurement:
    """What a run hands back.

    Args:
        rows: Measurements as a tidy table, one a row, with at least the columns ``quantity`` and ``value``; values that
            JSON can hold.
        summary: The headline for the progress line.
        data: What identifies the data behind it, for the provenance; values that JSON can hold.
    """

    rows: list[Row]
    summary: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One independent run of a study.

    Args:
        name: Unique in the study and a file name, e.g. ``"goat-seed0"``.
        configuration: Frozen dataclass with a ``seed``.
        measure: Function of a module (so that another process can call it): (configuration, checkpoint file) ->
            measurement. The checkpoint is of this run and configuration, or does not exist yet.
        chooses: Whether its record decides something, such as a learning rate. Such a run may not read test data, and
            no other run of the study starts before all of them are stored.
        continues: A choosing run of an equal configuration, whose trained weights this one reads where they are left.
    """

    name: str
    configuration: Configuration
    measure: Callable[[Any, Path], Measurement]
    chooses: bool = False
    continues: Run | None = None

    def __post_init__(self) -> None:
        plain = self.name.replace("-", "").replace("_", "").replace(".", "").isalnum()
        require(plain, "Run", "name", "have letters, digits and - _ . alone", self.name, "It becomes a file's name")

    def configuration_json(self) -> dict[str, Any]:
        """The configuration as JSON knows it."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self.configuration)))  # type: ignore[call-overload]
        return found


@dataclass(frozen=True, eq=False)
class Record:
    """A finished run.

    Attributes:
        name: Of the run.
        configuration: Of the run, as JSON.
        seed: Of the run.
        rows: Measurements.
        summary: The headline.
        device: Name of the device, e.g. ``"cpu"`` or ``"NVIDIA H200"``.
        seconds: Time in the process that finished the run.
        provenance: From :func:`eotattn.provenance.provenance`.
    """

    name: str
    configuration: dict[str, Any]
    seed: int
    rows: list[Row]
    summary: str
    device: str
    seconds: float
    provenance: dict[str, Any]

    @property
    def date(self) -> str:
        """When it was finished, UTC."""
        return str(self.provenance["date"])


#: Records by the names of their runs.
Records = Mapping[str, Record]


@dataclass(frozen=True)
class RunFolder:
    """The records of a figure's finished runs and the checkpoints of unfinished ones: ``<out>/<scale>/.runs/<figure>``.

    Args:
        results: The figure's folder of results.
    """

    results: ResultFolder

    @property
    def path(self) -> Path:
        """The folder; made when a run is."""
        return self.results.path / ".runs" / self.results.figure

    def checkpoint(self, run: Run) -> Path:
        """File of an unfinished run; its name depends on the configuration, so that no other one continues it."""
        digest = hashlib.sha256(json.dumps(run.configuration_json(), sort_keys=True).encode()).hexdigest()
        return self.path / f"{run.name}-{digest[:12]}.pt"

    def read(self, run: Run) -> Record | None:
        """The record of a run with this name and an equal configuration, or None."""
        file = self.path / f"{run.name}.json"
        if not file.exists():
            return None
        arrays = file.with_suffix(".npz")
        try:
            if arrays.exists() and zipfile.ZipFile(arrays).namelist():
                return None  # of an earlier version, which kept arrays beside rows
            stored = json.loads(file.read_text(encoding="utf-8"))
            if stored["configuration"] != run.configuration_json():
                return None
            return Record(**stored)
        except (OSError, ValueError, TypeError, LookupError, zipfile.BadZipFile) as error:
            message = (
                f"RunFolder: {file.name} must be whole; got {type(error).__name__}. Copy it again, or make the run "
                f"anew with --fresh --only {run.name}."
            )
            raise ValueError(message) from error

    def write(self, record: Record) -> None:
        """Store a record."""
        file = self.path / f"{record.name}.json"
        write_atomically(file, (json.dumps(vars(record), indent=1) + "\n").encode())
        file.with_suffix(".npz").unlink(missing_ok=True)  # of an earlier version

    def forget(self, only: Sequence[str] = ()) -> None:
        """Delete records and checkpoints of runs whose names match a pattern; of all runs by default."""
        for file in self.path.iterdir() if self.path.is_dir() else ():
            name = file.stem.rpartition("-")[0] if file.suffix == ".pt" else file.stem
            if not only or any(fnmatch(name, pattern) for pattern in only):
                file.unlink()


def make(run: Run, store: RunFolder) -> Record:
    """Make a run and store its record; an unfinished one continues from its checkpoint.

    The run sees torch's generators seeded with its own seed, whatever was made before it in this process.
    """
    checkpoint = store.checkpoint(run.continues or run)
    store.path.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    devices = [torch.cuda.current_device()] if training_device().type == "cuda" else []
    with torch.random.fork_rng(devices=devices), closed_data(run.chooses):
        torch.manual_seed(run.configuration.seed)
        measurement = run.measure(run.configuration, checkpoint)
    seconds = time.perf_counter() - started
    origin = provenance(
        command=f"eotattn train --figure {store.results.figure} --scale {store.results.scale} --only {run.name}",
        configuration=run.configuration,
        seeds=(run.configuration.seed,),
        device=training_device_name(),
        wall_seconds=seconds,
    )
    del origin["configuration"]  # stands beside it
    origin["data"] = dict(measurement.data)
    record = Record(
        name=run.name,
        configuration=run.configuration_json(),
        seed=run.configuration.seed,
        rows=measurement.rows,
        summary=measurement.summary,
        device=training_device_name(),
        seconds=seconds,
        provenance=origin,
    )
    if is_first_process():
        store.write(record)
        if not run.chooses:
            checkpoint.unlink(missing_ok=True)
    return record


def merged_provenance(records: Records, *, command: str, recipe: Any) -> dict[str, Any]:
    """Provenance of a figure made of records: the recipe, and for every run when, where and from which commit."""
    seeds: Sequence[int] = sorted({record.seed for record in records.values()})
    devices = ", ".join(sorted({record.device for record in records.values()}))
    seconds = sum(record.seconds for record in records.values())
    found = provenance(command=command, configuration=recipe, seeds=seeds, device=devices, wall_seconds=seconds)
    kept = ("commit", "dirty", "threads", "date", "wall_seconds")
    runs = {
        record.name: {"device": record.device} | {name: record.provenance[name] for name in kept}
        for record in records.values()
    }
    origins = [record.provenance for record in records.values()]
    different = {name: _different([origin[name] for origin in origins]) for name in ("versions", "data")}
    return found | different | {"runs": runs}


def _different(values: Sequence[Any]) -> list[Any]:
    """Values, each once, in order."""
    return [value for k, value in enumerate(values) if value not in values[:k]]
