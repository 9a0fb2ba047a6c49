"""The suite of statistics measures what it says: times of every form, and errors that would show."""

import importlib

import torch

from eotattn.benchmarks.suites.configuration import configure

suite = importlib.import_module("eotattn.benchmarks.suites.statistics")  # the package's attribute is the function
SMALL = configure("cpu", "float32", "small", rounds=1)


def test_times_and_errors_of_every_field():
    rows = list(suite.statistics(SMALL))
    times = [row for row in rows if row["quantity"] == "time"]
    assert [row["name"] for row in times] == [
        "SDPA, forward",
        "eotattn, no prior",
        "eotattn, recency + sink",
        "eotattn, no prior, blocks of rows",
    ]
    assert all(row["median_ms"] > 0 and "failure" not in row for row in times)
    errors = [row for row in rows if row["quantity"] != "time"]
    assert {row["quantity"] for row in errors} == {f"error of {field}" for field in suite.FIELDS}
    assert len(errors) == 2 * len(suite.FIELDS)
    assert max(row["value"] for row in errors) < 1e-5


def test_a_wrong_scale_shows_as_an_error(monkeypatch):
    compute = suite.row_statistics

    def wrong(query, key, **options):
        scale = 0.25 if query.dtype == torch.float64 else 0.26
        return compute(query, key, scale=scale, **options)

    monkeypatch.setattr(suite, "row_statistics", wrong)
    errors = {row["quantity"]: row["value"] for row in suite._errors(SMALL, "x", 2, 32, 16, with_prior=False)}
    counts = ("error of num_keys", "error of column_count")
    assert all(error > 1e-3 for name, error in errors.items() if name not in counts)
    assert all(errors[name] == 0 for name in counts)
