"""The project's own bounds: the notebook judges them by the tables alone, and says what is absent."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from eotattn.benchmarks.suites import SUITES

pd = pytest.importorskip("pandas")
ROOT = Path(__file__).parents[2]
CELLS = json.loads((ROOT / "notebooks" / "speed_and_precision.ipynb").read_text())["cells"]
TABLE = """\
name,length,ratio,median_ms,failure
bare,8,1,2.0,
ours,8,1.5,3.0,
ours,16,1.2,2.2,
peer,8,,,ImportError: No module
large,8,1.1,2.2,
large,16,,,OutOfMemoryError: CUDA out of memory
strange,8,nan,2.0,
strange,16,1.0,2.0,
"""


def cell_that_judges():
    (cell,) = [cell for cell in CELLS if cell["cell_type"] == "code" and "def judge(" in "".join(cell["source"])]
    return "".join(cell["source"])


def judged(figures):
    """The names that the notebook's cell leaves behind where the tables lie in ``figures``."""
    names = {"pd": pd, "figures": figures}
    exec(cell_that_judges(), names)
    return SimpleNamespace(**{name: names[name] for name in ("bounds", "verdict")})


@pytest.fixture
def row_of(tmp_path):
    """Judges one bound by the table above."""
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "bench_layer.csv").write_text(TABLE)

    def row_of(bound, name, suite="layer", column="ratio", *, where="", over="", limit=""):
        columns = ("what", "bound", "folder", "suite", "name", "column", "where", "over", "limit")
        cells = ("a bound", bound, "h200", suite, name, column, where, over, limit)
        pd.DataFrame([cells], columns=columns).to_csv(tmp_path / "bounds.csv", index=False)
        return judged(tmp_path).verdict.iloc[0]

    return row_of


@pytest.mark.parametrize(
    ("arguments", "options", "measured", "verdict"),
    [
        ((1.5, "ours"), {}, 1.5, "held"),
        ((1.2, "ours"), {}, 1.5, "missed by 25%"),
        ((1.2, "ours"), {"where": "length=16"}, 1.2, "held"),
        ((0.5, "ours", "layer", "median_ms"), {"where": "length=8", "over": "bare"}, 1.5, "missed by 200%"),
        ((0.5, "ours", "layer", "median_ms"), {"where": "length=16", "over": "bare"}, None, "not measured"),
        ((1.2, "peer"), {}, None, "not measured"),
        ((1.2, "large"), {}, None, "not measured"),
        ((1.2, "large"), {"where": "length=8"}, 1.1, "held"),
        ((1.2, "strange"), {}, None, "not measured"),
        ((1.2, "nobody"), {}, None, "not measured"),
        ((1.2, "ours", "layer", "peak_mib"), {}, None, "not measured"),
        ((1.2, "ours", "layer", "ratio"), {"where": "width=8"}, None, "not measured"),
        ((1.2, "ours", "decode"), {}, None, "not measured"),
    ],
)
def test_a_verdict_follows_from_the_rows(row_of, arguments, options, measured, verdict):
    row = row_of(*arguments, **options)
    assert np.isnan(row.measured) if measured is None else row.measured == pytest.approx(measured)
    assert row.verdict == verdict


def test_what_limits_stands_beside_the_verdict(row_of):
    row = row_of(1.2, "ours", where="length=8", limit="bare")
    assert (row.limit, row.limited) == ("bare", 1.0)
    for limit in ("peer", ""):
        row = row_of(1.2, "ours", where="length=8", limit=limit)
        assert row.limit == ""
        assert np.isnan(row.limited)


def test_every_bound_is_measured_and_every_limit_is_a_row_of_the_stored_tables():
    """A misspelt name would only look like one that nobody measured."""
    found = judged(ROOT / "figures")
    assert set(found.bounds.suite) <= set(SUITES)
    assert found.bounds.what.is_unique
    assert found.verdict.measured.notna().all()
    assert list(found.verdict.limit) == list(found.bounds.limit)


def test_the_notebook_shows_the_verdict_of_the_stored_tables():
    kinds = judged(ROOT / "figures").verdict.verdict.str.replace(r" by .*", "", regex=True).value_counts()
    line = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) + f" of {kinds.sum()}"
    printed = [out["text"] for cell in CELLS for out in cell.get("outputs", ()) if out["output_type"] == "stream"]
    assert any("".join(text).startswith(line) for text in printed)
