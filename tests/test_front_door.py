"""The front door: what it names, what it leaves for later, and that the package is complete."""

import importlib.metadata
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import eotattn

PACKAGE = Path(eotattn.__file__).parent
ROOT = PACKAGE.parent


def test_the_version_is_that_of_the_installed_package():
    try:
        installed = importlib.metadata.version("eotattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from a folder, not installed")
    assert eotattn.__version__ == installed


def test_the_version_of_a_folder_says_so(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert eotattn.__version__ == "unknown (run from a folder, not installed)"


def test_every_name_is_there():
    for name in eotattn.__all__:
        assert getattr(eotattn, name) is not None
    assert set(eotattn.__all__) <= set(dir(eotattn))
    with pytest.raises(AttributeError, match="module 'eotattn' has no attribute 'nothing'"):
        _ = eotattn.nothing


def test_analyze_is_imported_when_it_is_asked_for():
    script = """
        import sys, eotattn
        assert "analyze" in eotattn.__all__ and "eotattn.analysis" not in sys.modules
        eotattn.analyze
        assert "eotattn.analysis" in sys.modules and "matplotlib" in sys.modules
    """
    subprocess.run([sys.executable, "-c", "\n".join(line.strip() for line in script.splitlines())], check=True)


def test_help_is_a_map_of_the_rooms():
    text = pydoc.render_doc(eotattn, renderer=pydoc.plaintext)
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert len(rooms) > 10
    for room in rooms - {"__init__"}:
        assert f"eotattn.{room} " in text, room


def test_files_that_the_package_ships_are_there():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (licence,) = project["project"]["license-files"]
    assert (ROOT / licence).read_text().startswith("MIT License")
    shipped = {
        ROOT.joinpath(*package.split("."), name)
        for package, names in project["tool"]["setuptools"]["package-data"].items()
        for name in names
    }
    lying_there = {
        path
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert shipped == lying_there
