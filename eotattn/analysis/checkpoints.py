"""Sinks while they form: the checkpoints of a training run, analysed one after the other on the same texts.

Legend: S checkpoints, A layers, N texts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from eotattn.analysis.analysis_report import Analysis
from eotattn.analysis.folder import REPORT, check_folder, write_files
from eotattn.analysis.head_kinds import tellable
from eotattn.analysis.model_comparison import (
    FIRST,
    LOSS,
    NORM,
    SINKS,
    ModelComparison,
    compare,
    known_mean,
    text_numbers,
    whole_numbers,
)
from eotattn.analysis.page import page
from eotattn.analysis.run import analyze
from eotattn.analysis.texts import check_texts
from eotattn.checks import require, speaking_as
from eotattn.integrations.intervention_report import PairedMean
from eotattn.integrations.loading import check_files
from eotattn.plotting import panels
from eotattn.plotting.files import to_png
from eotattn.plotting.head_plots import plot_head_grid, plot_layer_curves
from eotattn.processes import is_first_process
from eotattn.provenance import Table, library_versions, table_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SinkFormation", "analyze_checkpoints", "checkpoints_in"]

OWNER = "analyze_checkpoints"
#: Columns of the table and curves of the figure, beside what a layer's strongest key is.
SHOWN = (SINKS, FIRST, "mass of the strongest key", "previous-token score", "induction score")


def checkpoints_in(folder: str | Path) -> dict[int, Path]:
    """Step -> folder of every ``checkpoint-<step>`` in a folder that is no model itself, in the order of steps."""
    path = Path(folder)
    if not path.is_dir() or (path / "config.json").is_file():
        return {}
    named = [(re.fullmatch(r"checkpoint-(\d+)", part.name), part) for part in path.iterdir() if part.is_dir()]
    return dict(sorted((int(match[1]), part) for match, part in named if match is not None))


@dataclass(frozen=True, eq=False)
class SinkFormation(Table):
    """What the attention of a model does, checkpoint by checkpoint.

    Attributes:
        steps: S training steps, increasing.
        analyses: The analysis of each.
        num_given: Checkpoints that were there; more where the run was interrupted.
    """

    steps: tuple[int, ...]
    analyses: tuple[Analysis, ...]
    num_given: int

    @property
    def is_complete(self) -> bool:
        """Whether every checkpoint was finished."""
        return len(self.steps) == self.num_given

    def to_dict(self) -> dict[str, NDArray[np.generic]]:
        """One row a checkpoint and layer: means over texts; of token scores, of the layer's highest head.

        "loss" and the norm of the first token are those of the whole model; "strongest key" is what is a sink of the
        layer in most texts.
        """
        rows: list[dict[str, Any]] = []
        for step, found in zip(self.steps, self.analyses, strict=True):
            numbers, whole = text_numbers(found), whole_numbers(found)
            for a, layer in enumerate(found.heads.layers):
                row: dict[str, Any] = {"step": step, "layer": layer}
                row |= {name: known_mean(numbers[name][a]).mean if name in numbers else math.nan for name in SHOWN}
                sinks = found.strongest.of(tellable(found)).common(a)
                row["strongest key"] = sinks[0][0] if sinks else ""
                named = {name: whole[name] for name in (NORM, LOSS) if name in whole}
                rows.append(row | {NORM: math.nan, LOSS: math.nan} | {n: known_mean(v).mean for n, v in named.items()})
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def change(self, first: int | None = None, last: int | None = None) -> ModelComparison:
        """What changed between two steps, by default from the first checkpoint to the last.

        Raises:
            ValueError: For steps without a checkpoint.
        """
        ends = [self.steps[0] if first is None else first, self.steps[-1] if last is None else last]
        known = all(step in self.steps for step in ends)
        require(known, "change", "steps", f"be among {self.steps}", ends, "Choose steps with a checkpoint")
        return compare(*(self.analyses[self.steps.index(step)] for step in ends))

    def curve(self, name: str) -> list[PairedMean]:
        """A quantity of the whole model at every step, mean over texts with its interval; NaN without one."""
        numbers = [whole_numbers(found) for found in self.analyses]
        return [known_mean(each.get(name, np.array([math.nan]))) for each in numbers]

    def plot(self) -> Figure:
        """Sinks by layer and step, and what is said of the whole model by step, with intervals over the texts."""
        figure, grid = panels(2, 3, size=(14, 7))
        rates = [[known_mean(row).mean for row in text_numbers(found)[SINKS]] for found in self.analyses]
        if np.isfinite(rates).any():  # the texts are long enough to tell a sink
            numbers = (self.analyses[0].heads.numbers, self.steps)
            plot_head_grid(np.transpose(rates), label=SINKS, low=0, high=1, numbers=numbers, axes=grid[0, 0])
        drawn = (SHOWN[:2], SHOWN[2:3], SHOWN[3:], (NORM,), (LOSS,))
        for axes, names in zip(grid.flat[1:], drawn, strict=True):
            curves = {name: self.curve(name) for name in names}
            if np.isfinite([each.mean for curve in curves.values() for each in curve]).any():
                means = {name: [each.mean for each in curve] for name, curve in curves.items()}
                ends = {name: ([c.low for c in curve], [c.high for c in curve]) for name, curve in curves.items()}
                label = (
                    "mean over texts" if len(names) > 1 else f"{LOSS} (nats a token)" if names == (LOSS,) else names[0]
                )
                plot_layer_curves(means, intervals=ends, layers=self.steps, ylabel=label, axes=axes)
        for axes in figure.axes[: grid.size]:
            axes.set_xlabel("step")
            if not axes.has_data():
                axes.set_axis_off()
        return figure

    def __str__(self) -> str:
        """One line a checkpoint, and what changed from the first to the last."""
        names = (LOSS, SINKS, FIRST, NORM, *SHOWN[3:])
        heads = (" loss", "sinks", "of them first", "norm of first / others", "previous token", "induction")
        lines = ["  ".join([f"{'step':>8}", *heads, "most often a sink"])]
        curves = {name: self.curve(name) for name in names}
        for s, (step, found) in enumerate(zip(self.steps, self.analyses, strict=True)):
            values = {name: curve[s].mean for name, curve in curves.items()}
            values[FIRST] = values[FIRST] / values[SINKS] if values[SINKS] else math.nan
            cells = [f"{values[n]:.3f}" if math.isfinite(values[n]) else "" for n in names]
            cells = [f"{cell:>{max(len(head), 5)}}" for cell, head in zip(cells, heads, strict=True)]
            lines.append("  ".join([f"{step:>8}", *cells, _most_common(found)]))
        if math.isnan(self.curve(SINKS)[0].mean):
            lines.append("These texts are too short to tell a sink: uniform attention would look like one.")
        if len(self.steps) > 1 and self.analyses[0].heads.num_sequences > 1:
            lines += ["", f"From step {self.steps[0]} to step {self.steps[-1]}:", str(self.change())]
        return "\n".join(lines)


@speaking_as(OWNER)
def analyze_checkpoints(
    folder: str | Path,
    texts: Sequence[str],
    *,
    out: str | Path | None = None,
    report: Callable[[str], object] | None = print,
    **options: Any,
) -> SinkFormation:
    """Analyse every checkpoint of a training run on the same texts: when sinks form, where, and what comes with them.

    Args:
        folder: Holds ``checkpoint-<step>`` folders, as transformers' ``Trainer`` writes them, each with a model in
            safetensors; the tokenizer is theirs or that of ``folder``.
        texts: At least one text; intervals need two.
        out: Folder for ``steps.csv``, ``steps.png`` and a page a checkpoint; written when all is done.
        report: Told, at the end, what changed and where it is; where ``out`` is given.
        options: ``layers``, ``heads``, ``max_length``, ``device`` and ``dtype`` of
            :func:`~eotattn.analysis.analyze`.

    Returns:
        :class:`SinkFormation`; prints as a table. An interruption (Ctrl-C) ends the run and keeps the checkpoints that
        were finished.

    Raises:
        KeyboardInterrupt: If no checkpoint was finished.
        ValueError: If there are no checkpoints, or one of them lacks files; before any is loaded.
    """
    found = checkpoints_in(folder)
    rule = "hold checkpoint-<step> folders and no config.json of its own"
    require(len(found) > 0, OWNER, "folder", rule, str(folder), "Pass the output folder of a Trainer")
    place = None if out is None else check_folder(OWNER, Path(out))
    check_texts(texts)
    for path in found.values():
        check_files(path)
    analyses: list[Analysis] = []
    try:
        for path in tqdm(found.values(), desc="checkpoints", leave=False, disable=None):
            analyses.append(analyze(path, texts, tokenizer=_tokenizer_for(path), **options))
            if not analyses[-1].is_complete:
                analyses.pop()
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        if not analyses:
            raise
    formation = SinkFormation(tuple(found)[: len(analyses)], tuple(analyses), len(found))
    if place is not None and is_first_process():
        write_files(OWNER, place, _contents(formation))
        if report is not None:
            report(f"Table, figure and a page a checkpoint: {out}/steps.csv, steps.png, step_<step>.html")
    return formation


def _tokenizer_for(path: Path) -> Path | None:
    """The folder beside a checkpoint that has a tokenizer, where the checkpoint has none."""
    return None if any(path.glob("tokenizer*")) or any(path.glob("vocab*")) else path.parent


def _most_common(found: Analysis) -> str:
    """What is a sink in most layers and texts."""
    counts: dict[str, int] = {}
    strongest = found.strongest.of(tellable(found))
    for a in range(len(strongest.layers)):
        for what, texts in strongest.common(a):
            counts[what] = counts.get(what, 0) + texts
    return max(counts, key=lambda what: counts[what]) if counts else "none"


def _contents(formation: SinkFormation) -> dict[str, bytes]:
    """Every file by name."""
    columns = formation.to_dict()
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*(v.tolist() for v in columns.values()), strict=True)]
    files = {"steps.csv": table_bytes(rows), "steps.png": to_png(formation.plot().axes[0])}
    pairs = zip(formation.steps, formation.analyses, strict=True)
    files |= {f"step_{step}.html": page(found).encode() for step, found in pairs}
    record = {"models": [str(found.subject) for found in formation.analyses], "steps": list(formation.steps)}
    record |= {"table": str(formation).splitlines(), "files": sorted(files), "versions": library_versions()}
    return files | {REPORT: (json.dumps(record, indent=2) + "\n").encode()}
