"""A study: what the runs of a figure measured, as one tidy table, and where that comes from.

It is made from the records of its runs, or read from the table that a study was saved as, with the same numbers (to the
seven digits of a table). Its tables, claims and picture follow from that table alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import pandas
from numpy.typing import NDArray

from eotattn.checks import require
from eotattn.experiments.intervals import SeedInterval
from eotattn.experiments.records import Records, merged_provenance
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.runs import Plan, stored_records
from eotattn.experiments.scales import SCALES

__all__ = ["Figure", "Study", "as_table", "paired", "savings", "select"]


@dataclass(frozen=True)
class Figure:
    """One figure: how it is called and what it is made of.

    Args:
        name: Of the notebook and of all its files.
        recipe: Scale -> recipe.
        runs: Lists the runs of a recipe, as in :mod:`eotattn.experiments.runs`.
        scales: Names of the scales that it has.
    """

    name: str
    recipe: Callable[[str], Any]
    runs: Plan
    scales: tuple[str, ...] = tuple(SCALES)


def as_table(records: Records) -> pandas.DataFrame:
    """A row a measurement, with the name and the seed of its run."""
    rows = [{"run": name, "seed": record.seed} | row for name, record in records.items() for row in record.rows]
    return _with_numbers(pandas.DataFrame(rows))


def _with_numbers(table: pandas.DataFrame) -> pandas.DataFrame:
    """Values as numbers; words, such as why a timing failed, in a column of their own."""
    if "value" not in table:
        return table
    numbers = pandas.to_numeric(table.value, errors="coerce")
    words = table.value.where(numbers.isna() & table.value.map(lambda value: isinstance(value, str)))
    return table.assign(value=numbers, **({"words": words} if words.notna().any() else {}))


def select(table: pandas.DataFrame, **where: Any) -> pandas.DataFrame:
    """The rows whose columns have these values; a column that the table lacks has none."""
    found = np.ones(len(table), dtype=bool)
    for column, value in where.items():
        found &= table[column].eq(value).to_numpy() if column in table else False
    return table[found]


S = TypeVar("S", bound="Study")


@dataclass(frozen=True, eq=False)
class Study:
    """The table of a figure; subclasses say what it means.

    Attributes:
        recipe: What was run.
        table: A row a measurement; columns run (in new tables), seed, quantity, value, and where it was measured.
        provenance: Of the figure.
    """

    recipe: Any
    table: pandas.DataFrame
    provenance: Mapping[str, Any]

    #: What is studied.
    figure: ClassVar[Figure]
    #: Whether it can be read while runs are missing.
    may_be_partial: ClassVar[bool] = False

    @classmethod
    def of(cls: type[S], recipe: Any, records: Records) -> S:
        """From records of runs; all that read a corpus must have read the same one."""
        data = {str(record.provenance["data"].get("sha256", "")) for record in records.values()} - {""}
        remedy = "Make all runs with one corpus, on one machine: eotattn train --fresh"
        require(len(data) <= 1, cls.__name__, "records", "come from one corpus", sorted(data), remedy)
        command = f"eotattn train --figure {cls.figure.name} --scale {recipe.scale}"
        return cls(recipe, as_table(records), merged_provenance(records, command=command, recipe=recipe))

    @classmethod
    def read(cls: type[S], recipe: Any, out: str) -> S:
        """From the records of finished runs, where there are some, else from the table that a study was saved as.

        Args:
            recipe: What was run.
            out: Folder of results.

        Raises:
            ValueError: If there is neither, or runs are missing.
        """
        folder = ResultFolder(out, recipe.scale, cls.figure.name)
        records, missing = stored_records(cls.figure.runs, recipe, folder)
        remedy = f"Run eotattn train --figure {cls.figure.name} --scale {recipe.scale}"
        if records:
            whole = cls.may_be_partial or not missing
            got = f"{len(records)}, without {', '.join(missing[:3])}"
            require(whole, cls.__name__, "folder", f"hold {len(records) + len(missing)} runs", got, remedy)
            return cls.of(recipe, records)
        stored = folder.path / f"{folder.figure}.csv"
        require(stored.is_file(), cls.__name__, "folder", "hold runs or a table", out, remedy)
        provenance = json.loads(stored.with_suffix(".json").read_text(encoding="utf-8"))
        return cls(recipe, _with_numbers(pandas.read_csv(stored, low_memory=False)), provenance)

    def save(self, out: str) -> ResultFolder:
        """Write the table and where it comes from to ``<out>/<scale>``."""
        folder = ResultFolder(out, self.recipe.scale, self.figure.name)
        filled = self.table.astype(object).where(self.table.notna(), "")
        folder.write_table(filled.to_dict("records"))
        folder.write_provenance(dict(self.provenance))
        return folder

    def rows(self, quantity: str, **where: Any) -> pandas.DataFrame:
        """Rows of one quantity."""
        return select(self.table, quantity=quantity, **where)

    def of_seeds(self, quantity: str, **where: Any) -> dict[int, float]:
        """Seed -> mean of a quantity; without what was undefined."""
        found = self.rows(quantity, **where).dropna(subset="value")
        return {int(seed): float(value) for seed, value in found.groupby("seed").value.mean().items()}

    def interval(self, quantity: str, **where: Any) -> SeedInterval | None:
        """A quantity over seeds; None where no run has it."""
        values = list(self.of_seeds(quantity, **where).values())
        return SeedInterval.of(values) if values else None

    def grid(self, quantity: str, index: str, columns: str, **where: Any) -> NDArray[np.float64]:
        """A quantity by two columns of the table, mean over all others, both in increasing order."""
        found = self.rows(quantity, **where).pivot_table(index=index, columns=columns, values="value")
        return found.to_numpy(dtype=np.float64)

    def origin(self) -> str:
        """Where the numbers come from: runs, devices, commits and data, in words."""
        runs = self.provenance["runs"].values()
        devices = ", ".join(sorted({run["device"] for run in runs}))
        commits = {f"{str(run['commit'])[:8]}{' with changes' if run['dirty'] else ''}" for run in runs}
        found = f"{len(runs)} runs, {sum(run['wall_seconds'] for run in runs):.0f} s on {devices}"
        found += f", at commit {', '.join(sorted(commits))}"
        hashes = [data["sha256"][:12] for data in self.provenance["data"] if "sha256" in data]
        return found + (f"; data {', '.join(hashes)}" if hashes else "")


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> SeedInterval:
    """One less the other, seed by seed, where both are known."""
    return SeedInterval.of([one[seed] - other[seed] for seed in one if seed in other])


def savings(ours: pandas.DataFrame, theirs: pandas.DataFrame) -> tuple[SeedInterval, SeedInterval]:
    """How much smaller one's values are than another's, paired by seed and document: over seeds, and over documents."""
    pairs = ours.merge(theirs, on=["seed", "document"], suffixes=("", "_other"))
    pairs["saved"] = pairs.value_other - pairs.value
    by_seed, by_document = (pairs.groupby(key).saved.mean().tolist() for key in ("seed", "document"))
    return SeedInterval.of(by_seed), SeedInterval.of(by_document)
