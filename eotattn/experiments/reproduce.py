"""Run the notebooks of the figures: the one function behind ``eotattn reproduce``."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eotattn.checks import require
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.scales import check_scale
from eotattn.records import write_atomically

__all__ = ["FIGURES", "find_notebooks", "reproduce", "strip_machine"]

#: Number in the paper -> name of the notebook and of all its files.
FIGURES = {1: "fig1_copy_mixture", 2: "fig2_language"}

#: What the notebooks need beyond the package's own requirements.
REQUIREMENTS = ("accelerate", "ipykernel", "pandas", "papermill")


def find_notebooks() -> Path:
    """The folder of notebooks beside the package, as in a clone with an editable installation.

    Raises:
        ValueError: If the package runs from somewhere without notebooks.
    """
    folder = Path(__file__).resolve().parents[2] / "notebooks"
    missing = [name for name in FIGURES.values() if not (folder / f"{name}.ipynb").is_file()]
    remedy = "Run from a clone: git clone the repository, then pip install -e '.[experiments]'"
    require(not missing, "reproduce", "the notebooks", "lie in a folder beside the package", "no such files", remedy)
    return folder


def reproduce(
    figures: Sequence[int] | None = None,
    *,
    scale: str = "laptop",
    out: str = "figures",
    report: Callable[[str], None] = print,
) -> list[Path]:
    """Execute the notebooks of figures; tables, plots, provenance and executed notebooks land in ``<out>/<scale>/``.

    Args:
        figures: Numbers in :data:`FIGURES`; all of them by default.
        scale: A name in :data:`eotattn.experiments.scales.SCALES`.
        out: Folder of results, relative to the working directory or absolute.
        report: Receives one line before and after every figure.

    Returns:
        The executed notebooks.

    Raises:
        ValueError: Before any work, for an unknown figure or scale, a folder that cannot be written, or no notebooks.
    """
    check_scale("reproduce", scale)
    numbers = sorted(FIGURES if not figures else set(figures))
    unknown = [number for number in numbers if number not in FIGURES]
    rule = "be among " + ", ".join(str(number) for number in FIGURES)
    require(not unknown, "reproduce", "figures", rule, unknown, "Choose one of these numbers")
    absent = [name for name in REQUIREMENTS if importlib.util.find_spec(name) is None]
    remedy = "pip install 'eotattn[experiments]'"
    got = "without " + ", ".join(absent)
    require(not absent, "reproduce", "the environment", "have " + ", ".join(REQUIREMENTS), got, remedy)
    folder = find_notebooks()
    targets = [ResultFolder(out, scale, FIGURES[number]) for number in numbers]
    executed = []
    for number, target in zip(numbers, targets, strict=True):
        report(f"figure {number}: running {target.figure} at scale {scale}")
        executed.append(_execute(folder / f"{target.figure}.ipynb", target))
        report(f"figure {number}: wrote {target.path / target.figure}.{{ipynb,png,pdf,csv,json}}")
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
