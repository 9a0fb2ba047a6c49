"""Verdicts come from the tables alone, and absent numbers are said to be absent."""

import csv
from pathlib import Path

import pytest

from eotattn.benchmarks.suites import SUITES
from eotattn.benchmarks.verdict import RULES, Rule, judge, read_tables

TABLES = {
    "layer": [
        {"name": "bare", "length": "8", "ratio": "1", "median_ms": "2.0"},
        {"name": "ours", "length": "8", "ratio": "1.5", "median_ms": "3.0"},
        {"name": "ours", "length": "16", "ratio": "1.2", "median_ms": "2.2"},
        {"name": "peer", "length": "8", "ratio": "", "failure": "ImportError: No module"},
        {"name": "large", "length": "8", "ratio": "1.1", "median_ms": "2.2"},
        {"name": "large", "length": "16", "ratio": "", "failure": "OutOfMemoryError: CUDA out of memory"},
    ]
}


@pytest.mark.parametrize(
    ("rule", "measured", "verdict"),
    [
        (Rule("", 1.5, "layer", "ours"), 1.5, "held"),
        (Rule("", 1.2, "layer", "ours"), 1.5, "missed by 25%"),
        (Rule("", 1.2, "layer", "ours", where={"length": 16}), 1.2, "held"),
        (Rule("", 0.5, "layer", "ours", "median_ms", {"length": 8}, over="bare"), 1.5, "missed by 200%"),
        (Rule("", 0.5, "layer", "ours", "median_ms", {"length": 16}, over="bare"), None, "not measured"),
        (Rule("", 1.2, "layer", "peer"), None, "not measured"),
        (Rule("", 1.2, "layer", "large"), None, "not measured"),
        (Rule("", 1.2, "layer", "large", where={"length": 8}), 1.1, "held"),
        (Rule("", 1.2, "layer", "ours", "peak_mib"), None, "not measured"),
        (Rule("", 1.2, "decode", "ours"), None, "not measured"),
    ],
)
def test_a_verdict_follows_from_the_rows(rule, measured, verdict):
    (row,) = judge(TABLES, [rule])
    assert row["measured"] == (None if measured is None else pytest.approx(measured))
    assert row["verdict"] == verdict


def test_what_limits_stands_beside_the_verdict():
    rules = [Rule("", 1.2, "layer", "ours", where={"length": 8}, limit=name) for name in ("bare", "peer", None)]
    assert [(row["limit"], row["limited"]) for row in judge(TABLES, rules)] == [("bare", 1.0), ("", None), ("", None)]


def test_not_a_number_is_no_success():
    (row,) = judge({"layer": [{"name": "ours", "ratio": "nan"}]}, [Rule("", 1.0, "layer", "ours")])
    assert row["verdict"].startswith("missed")


def test_rules_ask_for_what_suites_measure():
    assert {rule.suite for rule in RULES} <= {*SUITES, "layer on a CPU"}
    assert len({rule.what for rule in RULES}) == len(RULES)


def test_limits_are_rows_of_the_stored_tables():
    """A misspelt limit would only look like one that nobody measured."""
    tables = read_tables(Path(__file__).parents[2] / "figures" / "h200")
    assert all(rule.limited(tables) is not None for rule in RULES if rule.limit is not None)


def test_tables_are_read_by_suite(tmp_path):
    with (tmp_path / "bench_layer.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["name", "ratio"], ["ours", "1.1"]])
    assert read_tables(tmp_path) == {"layer": [{"name": "ours", "ratio": "1.1"}]}
