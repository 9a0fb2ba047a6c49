"""The front door: what it names, what it leaves for later, and that the package is complete."""

import importlib.metadata
import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eotattn
from eotattn.attention import KeyValueCache, PackedDocuments

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


def test_rooms_above_are_imported_when_they_are_asked_for():
    script = """
        import sys, eotattn
        assert {"analyze", "attach", "intervene"} <= set(eotattn.__all__)
        assert not {"eotattn.analysis", "eotattn.integrations"} & set(sys.modules)
        eotattn.attach, eotattn.intervene
        assert "eotattn.integrations" in sys.modules and "transformers" not in sys.modules
        eotattn.analyze
        assert "eotattn.analysis" in sys.modules and "matplotlib" in sys.modules
    """
    subprocess.run([sys.executable, "-c", "\n".join(line.strip() for line in script.splitlines())], check=True)


def test_help_is_a_map_of_the_rooms():
    text = pydoc.render_doc(eotattn, renderer=pydoc.plaintext)
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert len(rooms) > 10
    for room in rooms - {"__init__", "__main__"}:
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


def test_help_shows_what_a_prior_takes():
    assert str(inspect.signature(eotattn.RelativeBiasPrior)) == "(num_heads: 'int', max_lag: 'int') -> 'None'"


PRIOR = eotattn.RelativeBiasPrior(2, max_lag=3)
PROBLEM = eotattn.TransportProblem(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("one", "shows"),
    [
        (PRIOR, "num_heads=2, max_lag=3, table=(2, 7)"),
        (0.5 * PRIOR + PRIOR, "RelativeBiasPrior(num_heads=2"),
        (eotattn.SinkPrior(2, length_scale=9.0), "length_scale=9.0"),
        (eotattn.PriorAttention(8, 2, prior=PRIOR), "embed_dim=8, num_heads=2"),
        (
            eotattn.RecencyPrior(2).lanes(torch.arange(4), torch.arange(4), dtype=torch.bfloat16),
            "torch.bfloat16, error",
        ),
        (PackedDocuments([3, 4]), "2 of 3 to 4 tokens"),
        (KeyValueCache(1, 2, 9, 8, 8), "0 of 9 slots"),
        (PROBLEM, "queries=2, keys=3"),
        (eotattn.solve(PROBLEM), "1 of 1 converged"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_public_objects_say_what_they_are(one, shows):
    assert shows in repr(one)
    assert " at 0x" not in repr(one)
    assert "tensor(" not in repr(one)
