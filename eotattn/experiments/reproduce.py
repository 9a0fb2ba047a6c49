"""The figures by number: what ``eotattn train`` makes and ``eotattn reproduce`` draws."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eotattn.checks import check_installed, check_positive, check_positive_int, require, speaking_as
from eotattn.experiments.device import join_processes, leave_processes
from eotattn.experiments.figures import (
    ablations,
    fig1_copy_mixture,
    fig2_language,
    fig3_retrieval,
    fig4_dna,
    fig5_vision,
    language_books,
    sink_study,
)
from eotattn.experiments.records import RunFolder
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.runs import RunsFailedError, UnknownRunsError, perform
from eotattn.experiments.scales import ALL_SCALES, check_scale
from eotattn.experiments.study import Figure
from eotattn.experiments.tasks.token_text import BOOKS, DATA_VARIABLE, TokenText
from eotattn.processes import is_first_process, num_processes
from eotattn.provenance import check_writable, write_atomically

__all__ = ["FIGURES", "Figure", "find_notebooks", "make_runs", "reproduce", "strip_machine"]


#: Number in the paper, or name -> figure. A new figure is one line.
FIGURES = {
    "1": fig1_copy_mixture.FIGURE,
    "2": fig2_language.FIGURE,
    "3": fig3_retrieval.FIGURE,
    "4": fig4_dna.FIGURE,
    "5": fig5_vision.FIGURE,
    "ablations": ablations.FIGURE,
    "sinks": sink_study.FIGURE,
    "books": language_books.FIGURE,
}

#: What the notebooks need beyond the package's own requirements.
REQUIREMENTS = ("ipykernel", "papermill")


def find_notebooks(figures: Iterable[Figure]) -> Path:
    """The folder of notebooks beside the package, as in a clone with an editable installation.

    Args:
        figures: Whose notebooks must be there.

    Raises:
        ValueError: If the package runs from somewhere without them.
    """
    folder = Path(__file__).resolve().parents[2] / "notebooks"
    missing = [figure.name for figure in figures if not (folder / f"{figure.name}.ipynb").is_file()]
    remedy = "Run from a clone: git clone the repository, then pip install -e '.[experiments]'"
    require(not missing, "reproduce", "the notebooks", "lie in a folder beside the package", f"no {missing}", remedy)
    return folder


def choose_figures(owner: str, figures: Sequence[int | str] | None, scale: str) -> dict[str, Figure]:
    """Figures by number or by name, each once, in the order of :data:`FIGURES`; by default all that have the scale."""
    at_scale = [key for key, figure in FIGURES.items() if scale in figure.scales]
    wanted = [str(figure) for figure in figures or at_scale]
    known = {name for key, figure in FIGURES.items() for name in (key, figure.name)}
    unknown = [name for name in wanted if name not in known]
    require(not unknown, owner, "figures", f"be among {', '.join(FIGURES)}", unknown, "Choose among these")
    found = {key: figure for key, figure in FIGURES.items() if key in wanted or figure.name in wanted}
    for figure in found.values():
        check_scale(owner, scale, figure.scales)
    return found


def _reads_books(figure: Figure, scale: str) -> bool:
    """Whether the runs of a figure read a corpus of prepared books."""
    return bool(getattr(figure.recipe(scale), "corpus", "") == BOOKS)


@speaking_as("train")
def make_runs(  # noqa: PLR0913 - what the command line offers
    figures: Sequence[int | str] | None = None,
    *,
    scale: str = "laptop",
    out: str = "figures",
    jobs: int | None = None,
    only: Sequence[str] = (),
    fresh: bool = False,
    data: str | None = None,
    minutes: float = math.inf,
    report: Callable[[str], None] = print,
) -> None:
    """Make the missing runs of figures, without notebooks: the function behind ``eotattn train``.

    Runs go side by side, one a GPU. Processes that torchrun or accelerate started instead share each run, batch by
    batch (:mod:`eotattn.experiments.training`), as the study of sinks at scale ``"paper"`` is meant to run::

        eotattn prepare FOLDER --out DIR
        torchrun --nproc-per-node 4 -m eotattn train --figure sinks --scale paper --data DIR

    Args:
        figures: Keys of :data:`FIGURES` or names of figures; all of them by default.
        scale: A name in :data:`eotattn.experiments.scales.ALL_SCALES`.
        out: Folder of results, relative to the working directory or absolute.
        jobs: Runs side by side, as in :func:`eotattn.experiments.runs.perform`; 1 where processes share each run.
        only: Names of runs, or patterns, each of a run of some of the figures; all by default.
        fresh: Forget these runs' records first.
        data: Folder of a prepared corpus, for figures that read one.
        minutes: No run of a figure starts later than this, as in :func:`eotattn.experiments.runs.perform`.
        report: Receives one line a run.

    Raises:
        ValueError: Before any work, for an unknown figure or scale, no jobs, or a folder that cannot be written; in the
            end, for a pattern that names a run of none of the figures.
        RunsFailedError: In the end, if a run failed.
    """
    check_scale("train", scale, ALL_SCALES)
    require(
        not isinstance(only, str), "train", "only", "be a list of names", only, "Put it into a list", error=TypeError
    )
    if jobs is not None:
        check_positive_int("train", "jobs", jobs)
    check_positive("train", "minutes", minutes, allow_inf=True)
    if data is not None:
        require(Path(data).is_dir(), "train", "data", "be a folder that exists", data, "Prepare a corpus first")
        os.environ[DATA_VARIABLE] = str(Path(data).absolute())
    chosen = choose_figures("train", figures, scale).values()
    reads_books = any(_reads_books(figure, scale) for figure in chosen)
    require(data is None or reads_books, "train", "data", "go with a figure that reads books", data, "Drop it")
    if reads_books:
        TokenText.open(BOOKS)  # raises where there are none, or not all
    targets = [(figure, ResultFolder(out, scale, figure.name)) for figure in chosen]
    failed: list[str] = []
    unknown: list[UnknownRunsError] = []
    join_processes()
    for figure, target in targets:
        report(f"{figure.name} at scale {scale}")
        if fresh and is_first_process():
            RunFolder(target).forget(only)
        try:
            perform(figure.runs, figure.recipe(scale), target, jobs=jobs, only=only, minutes=minutes, report=report)
        except UnknownRunsError as error:
            unknown.append(error)
        except RunsFailedError as error:
            failed += error.names
    leave_processes()
    if len(unknown) == len(targets) and set.intersection(*(set(error.patterns) for error in unknown)):
        raise unknown[0]
    if failed:
        raise RunsFailedError(failed)


@speaking_as("reproduce")
def reproduce(
    figures: Sequence[int | str] | None = None,
    *,
    scale: str = "laptop",
    out: str = "figures",
    jobs: int | None = None,
    fresh: bool = False,
    report: Callable[[str], None] = print,
) -> list[Path]:
    """Make the missing runs of figures, then execute their notebooks, which draw them.

    Tables, plots, provenance and executed notebooks land in ``<out>/<scale>/``. Runs whose records are stored there are
    read; so a figure whose runs were made on another machine is drawn on this one.

    Args:
        figures: Keys of :data:`FIGURES` or names of figures; all of them by default.
        scale: A name in :data:`eotattn.experiments.scales.ALL_SCALES`.
        out: Folder of results, relative to the working directory or absolute.
        jobs: Runs side by side, as in :func:`eotattn.experiments.runs.perform`.
        fresh: Forget stored runs first.
        report: Receives one line before and after every figure, and one a run, with the time left.

    Returns:
        The executed notebooks.

    Raises:
        ValueError: Before any work, for an unknown figure or scale, no jobs, a folder that cannot be written, or no
            notebooks.
        RunsFailedError: If a run failed; its figure is not drawn.
    """
    check_scale("reproduce", scale, ALL_SCALES)
    if jobs is not None:
        check_positive_int("reproduce", "jobs", jobs)
    found = choose_figures("reproduce", figures, scale)
    rule, remedy = "be drawn by one process", "Make their runs with eotattn train"
    require(num_processes() == 1, "reproduce", "figures", rule, f"{num_processes()} processes", remedy)
    check_writable("reproduce", Path(out) / scale, given=out)
    check_installed("reproduce", "experiments", *REQUIREMENTS)
    folder = find_notebooks(found.values())
    for figure in found.values():
        if _reads_books(figure, scale) and not (Path(out) / scale / ".runs" / figure.name).exists():
            TokenText.open(BOOKS)
    targets = {key: ResultFolder(out, scale, figure.name) for key, figure in found.items()}
    executed = []
    for key, target in targets.items():
        report(f"figure {key}: {target.figure} at scale {scale}")
        if fresh:
            RunFolder(target).forget()
        perform(found[key].runs, found[key].recipe(scale), target, jobs=jobs, report=report)
        executed.append(_execute(folder / f"{target.figure}.ipynb", target))
        report(f"figure {key}: wrote {target.path / target.figure}.{{ipynb,png,pdf,csv,json}}")
    return executed


def _execute(notebook: Path, target: ResultFolder) -> Path:
    """Run one notebook in the result folder, so that no path of this machine enters it."""
    import papermill

    path = target.path / notebook.name
    with tempfile.TemporaryDirectory() as scratch, _this_interpreter(Path(scratch)):
        raw = Path(scratch) / notebook.name
        papermill.execute_notebook(
            str(notebook),
            str(raw),
            parameters={"scale": target.scale, "out": ".."},
            kernel_name="python3",
            cwd=str(target.path),
            progress_bar=sys.stderr.isatty(),
        )
        content = strip_machine(json.loads(raw.read_text(encoding="utf-8")))
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return path


@contextmanager
def _this_interpreter(scratch: Path) -> Iterator[None]:
    """Make ``python3`` name a kernel of the running interpreter and package, whatever kernels are registered."""
    spec = {
        # papermill raises where a cell fails or the kernel dies, so the kernel's own log would only repeat it.
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=50"],
        "display_name": "Python 3",
        "language": "python",
        "env": {
            "PYTHONPATH": _python_path(),
            # tqdm asks every kernel for ipywidgets, but the bars of training show on terminals only.
            "PYTHONWARNINGS": "ignore:IProgress not found",
            # Threads that wait by spinning make training several times slower where other work shares the cores.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        },
    }
    kernel = scratch / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(scratch), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["JUPYTER_PATH"]
        else:
            os.environ["JUPYTER_PATH"] = before


def _python_path() -> str:
    package_parent = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))


def strip_machine(notebook: dict[str, Any]) -> dict[str, Any]:
    """Drop what tells one machine or run from another: papermill's paths and times, the kernel, cell timings.

    Args:
        notebook: Parsed notebook; changed in place and returned.

    Example:
        >>> strip_machine({"metadata": {"papermill": {"input_path": "x"}}, "cells": []})["metadata"]
        {'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}}
    """
    metadata = notebook["metadata"]
    metadata.pop("papermill", None)
    metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for cell in notebook["cells"]:
        for name in ("papermill", "execution"):
            cell["metadata"].pop(name, None)
    return notebook
