"""Where numbers come from: whole files, nothing of this machine's paths, the state of the checkout."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from eotattn import provenance as provenance_module
from eotattn.provenance import Table, git_state, library_versions, provenance, write_atomically


@dataclass(frozen=True)
class Recipe:
    steps: int = 3


def record(configuration):
    return provenance(
        command="eotattn reproduce", configuration=configuration, seeds=(0, 1), device="cpu", wall_seconds=1.23456
    )


def test_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    write_atomically(path, b"old")

    def break_off(self, content):
        self.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", break_off)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new content")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_provenance_names_no_folder_of_this_machine(tmp_path):
    text = json.dumps(record(Recipe()))
    for folder in (Path.home(), Path(provenance_module.__file__).parents[1], tmp_path, Path.cwd()):
        assert str(folder) not in text


def test_git_state_of_a_checkout_and_of_none(tmp_path, monkeypatch):
    monkeypatch.delenv("EOTATTN_COMMIT", raising=False)
    assert git_state(tmp_path) == {"commit": "unknown", "dirty": None}
    package = tmp_path / "clone" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "start"]):
        subprocess.run(["git", "-C", str(package.parent), *command], check=True)
    state = git_state(package)
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (package / "__init__.py").write_text("changed = True")
    assert git_state(package)["dirty"] is True
    monkeypatch.setenv("EOTATTN_COMMIT", "of a copy")
    assert git_state(package) == {"commit": "of a copy", "dirty": None}


def test_versions_name_what_is_absent(monkeypatch):
    monkeypatch.setattr(provenance_module, "LIBRARIES", ("torch", "no-such-library"))
    assert library_versions()["no-such-library"] == "absent"


def test_a_recipe_is_a_dataclass():
    assert record(Recipe())["configuration"] == {"steps": 3}
    with pytest.raises(TypeError, match="configuration must be a dataclass"):
        record({"steps": 3})


class Sizes(Table):
    """A table of fifty rows."""

    def to_dict(self):
        return {"name": [f"<{i}>" for i in range(50)], "size": np.append(np.arange(49) / 3, np.nan)}


def test_tables_show_their_first_rows_and_say_how_many_there_are():
    shown = Sizes()._repr_html_()
    assert shown.count("<tr>") == 1 + Sizes.shown_rows
    assert "<td>&lt;1&gt;</td><td>0.3333</td>" in shown
    assert "The first 40 of 50 rows." in shown
    assert "nan" not in shown


def test_tables_become_frames():
    pandas = pytest.importorskip("pandas")
    frame = Sizes().to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["size"].tolist()[:3] == [0.0, 1 / 3, 2 / 3]
