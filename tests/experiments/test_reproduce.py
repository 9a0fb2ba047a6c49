"""Reproduce: refuses before work, and leaves no trace of the machine in what it stores."""

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from eotattn.experiments import reproduce as room
from eotattn.experiments.reproduce import FIGURES, find_notebooks, reproduce, strip_machine


@pytest.fixture
def executed(monkeypatch):
    """Records what would be executed instead of executing it; no run is made either."""
    calls = []
    monkeypatch.setattr(room, "REQUIREMENTS", ())
    monkeypatch.setattr(room, "perform", lambda plan, recipe, target, **options: options["report"](target.figure))
    monkeypatch.setattr(room, "_execute", lambda notebook, target: calls.append((notebook, target)) or notebook)
    return calls


def test_all_figures_run_by_default_into_the_folder_of_the_scale(executed, tmp_path):
    lines = []
    reproduce(scale="smoke", out=str(tmp_path), report=lines.append)
    assert [notebook.stem for notebook, _ in executed] == [figure.name for figure in FIGURES.values()]
    assert all(target.path == tmp_path / "smoke" for _, target in executed)
    names = [figure.name for figure in FIGURES.values()]
    assert lines[1::3] == names, "what the runs report stands between the two lines of a figure"
    assert len(lines) == 3 * len(FIGURES)


def test_figures_run_once_each_in_order(executed, tmp_path):
    reproduce([2, "1", "fig2_language"], scale="smoke", out=str(tmp_path), report=lambda line: None)
    assert [target.figure for _, target in executed] == ["fig1_copy_mixture", "fig2_language"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"figures": [7]}, r"reproduce: figures must be among 1, 2.*; got \['7'\]"),
        ({"scale": "huge"}, "scale must be one of 'smoke'"),
        ({"jobs": 0}, "reproduce: jobs must be at least 1; got 0"),
        ({"out": "file"}, "out must be a folder that can be written"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, says, executed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ValueError, match=says):
        reproduce(**({"scale": "smoke", "out": "results"} | arguments))
    assert executed == []


def test_missing_requirements_and_notebooks_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "REQUIREMENTS", ("no_such_library",))
    says = r"reproduce: no_such_library must be installed; got none\. Run pip install 'eotattn\[experiments\]'"
    with pytest.raises(ModuleNotFoundError, match=says):
        reproduce(scale="smoke", out=str(tmp_path))
    monkeypatch.setattr(room, "REQUIREMENTS", ())
    monkeypatch.setattr(room, "__file__", str(tmp_path / "a" / "b" / "reproduce.py"))
    with pytest.raises(ValueError, match="the notebooks must lie in a folder beside the package"):
        reproduce(scale="smoke", out=str(tmp_path))


@pytest.mark.parametrize("figure", [figure.name for figure in FIGURES.values()])
def test_notebooks_follow_the_rules(figure):
    cells = json.loads((find_notebooks([]) / f"{figure}.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) <= 12
    assert "arXiv" in "".join(cells[0]["source"])
    assert [cell["metadata"].get("tags") for cell in code if cell["metadata"].get("tags")] == [["parameters"]]
    for before, cell in pairwise(cells):
        assert not (before["cell_type"] == cell["cell_type"] == "code"), "prose comes before each code cell"
    assert "verdict" in "".join(cells[-1]["source"])


def test_stored_notebook_forgets_the_machine():
    notebook = {
        "metadata": {"papermill": {"input_path": "/somewhere"}, "kernelspec": {"name": "venv"}},
        "cells": [{"metadata": {"papermill": {"duration": 1}, "execution": {"t": 0}, "tags": ["parameters"]}}],
    }
    stripped = strip_machine(notebook)
    assert "somewhere" not in json.dumps(stripped)
    assert stripped["cells"][0]["metadata"] == {"tags": ["parameters"]}


def test_kernel_is_this_interpreter_whatever_is_registered(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", "elsewhere")
    with room._this_interpreter(tmp_path):
        assert os.environ["JUPYTER_PATH"].split(os.pathsep) == [str(tmp_path), "elsewhere"]
        spec = json.loads((tmp_path / "kernels" / "python3" / "kernel.json").read_text())
        assert spec["argv"][0] == sys.executable
        assert str(Path(room.__file__).parents[2]) in spec["env"]["PYTHONPATH"].split(os.pathsep)
    assert os.environ["JUPYTER_PATH"] == "elsewhere"
