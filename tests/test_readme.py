"""What the README shows is run, and what the package ships is complete."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_readme_has_an_example_for_each_of_the_three_users():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("source", EXAMPLES, ids=range(len(EXAMPLES)))
def test_readme_example_runs(source, request, tmp_path, monkeypatch):
    module = f"readme_example_{request.node.callspec.id}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(module)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_executed_and_without_errors(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert len(cells) <= 12


def test_every_stored_figure_has_picture_table_and_provenance():
    figures = {path.with_suffix("") for path in (ROOT / "figures").rglob("*.png")}
    assert figures
    for figure in figures:
        for ending in (".pdf", ".csv", ".json"):
            assert figure.with_suffix(ending).exists(), f"{figure.name}{ending} is missing"
        provenance = json.loads(figure.with_suffix(".json").read_text())
        for name in ("command", "configuration", "seed", "commit", "versions", "device", "date"):
            assert name in provenance, f"{figure.name}.json lacks {name}"
