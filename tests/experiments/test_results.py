"""Results: tidy tables, complete provenance, equal files for equal figures, folders that can be written."""

import csv
import json
import os

import matplotlib.pyplot as plt
import pytest

from eotattn.experiments.figures import fig1_copy_mixture
from eotattn.experiments.results import ResultFolder
from eotattn.provenance import provenance


def record(**changes):
    arguments = {
        "command": "eotattn reproduce --figure 1 --scale smoke",
        "configuration": fig1_copy_mixture.recipe("smoke"),
        "seeds": (0, 1),
        "device": "cpu",
        "wall_seconds": 1.23456,
    }
    return provenance(**(arguments | changes))


def test_table_is_tidy_and_reads_back(tmp_path):
    rows = [{"panel": "a", "length": 64, "value": 1 / 3}, {"panel": "b", "head": 2, "value": float("-inf")}]
    path = ResultFolder(str(tmp_path), "smoke", "fig1_copy_mixture").write_table(rows)
    assert path == tmp_path / "smoke" / "fig1_copy_mixture.csv"
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert found[0] == {"panel": "a", "length": "64", "value": "0.3333333", "head": ""}
    assert found[1] == {"panel": "b", "length": "", "value": "-inf", "head": "2"}


def test_provenance_is_complete_and_plain_json(tmp_path):
    found = json.loads(ResultFolder(str(tmp_path), "smoke", "fig1_copy_mixture").write_provenance(record()).read_text())
    complete = {"command", "configuration", "seed", "commit", "dirty", "versions", "device", "date", "wall_seconds"}
    assert complete <= set(found)
    assert found["seed"] == [0, 1]
    assert found["configuration"]["training"]["steps"] == fig1_copy_mixture.recipe("smoke").training.steps
    assert found["wall_seconds"] == 1.23
    assert found["versions"]["torch"].startswith("2.")


def test_equal_figures_are_equal_files(tmp_path):
    contents = []
    for folder in ("one", "two"):
        figure, axes = plt.subplots(figsize=(2, 1))
        axes.plot([0, 1])
        png, pdf = ResultFolder(str(tmp_path / folder), "smoke", "fig").write_figure(figure)
        plt.close(figure)
        assert png.read_bytes()[1:4] == b"PNG"
        assert pdf.read_bytes()[:4] == b"%PDF"
        contents.append(png.read_bytes() + pdf.read_bytes())
    assert contents[0] == contents[1]


def test_unwritable_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"ResultFolder: out must be a folder that can be written; got .*directory"):
        ResultFolder(str(tmp_path / "file"), "smoke", "fig")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions bind ordinary users on POSIX only")
def test_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        ResultFolder(str(tmp_path), "smoke", "fig")


def test_bad_arguments_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="scale must be one of 'smoke', 'laptop', 'h200', 'paper', 'gpu'; got 'huge'"):
        ResultFolder(str(tmp_path), "huge", "fig")
    with pytest.raises(ValueError, match="rows must hold at least one row"):
        ResultFolder(str(tmp_path), "smoke", "fig").write_table([])
