"""The benchmarks run on a CPU in seconds, say what failed, and measure what they claim."""

import csv
import json
import time

import pytest
import torch
from tolerances import assert_close

from eotattn.benchmarks import timing
from eotattn.benchmarks.oracle import causal_rows, gate_gradient, slope_gradient
from eotattn.benchmarks.report import BenchTable, bench, format_table
from eotattn.benchmarks.suites import SUITES, configure
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.gradients import gate_errors
from eotattn.benchmarks.timing import Candidate, measure
from eotattn.cli import main
from eotattn.priors import RecencyPrior

CPU = torch.device("cpu")
SPEEDS = {"slow": 0.2, "quick": 1e-4}  # seconds


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_runs_and_writes(suite, tmp_path):
    dtype = "bfloat16" if suite in ("precision", "gradients") else "float32"
    table = bench(suite, configure("cpu", dtype, "small", rounds=2), out=str(tmp_path))
    with (tmp_path / f"bench_{suite}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(str(table).splitlines()) - 1 == len(table.rows)
    assert not [row for row in rows if row["name"].startswith("eotattn") and row.get("failure")]
    record = json.loads((tmp_path / f"bench_{suite}.json").read_text())
    assert record["command"].startswith(f"eotattn bench {suite} --device cpu")
    assert {"commit", "seed", "versions", "date", "configuration"} <= set(record)


def test_a_table_is_shown_in_a_notebook_and_is_a_frame():
    table = BenchTable(({"name": "a < b", "value": 0.12345}, {"name": "c", "failure": "none"}))
    shown = table._repr_html_()
    assert "<th>value</th><th>failure</th><th>name</th>" in shown
    assert "<td>0.123</td><td></td><td>a &lt; b</td>" in shown
    frame = pytest.importorskip("pandas") and table.to_frame()
    assert list(frame.columns) == ["name", "value", "failure"]
    assert frame.value.iloc[0] == 0.12345


def test_times_are_medians_of_interleaved_calls():
    calls = []

    def candidate(name, seconds):
        def run():
            calls.append(name)
            time.sleep(seconds)

        return Candidate(name, lambda: run)

    rows = measure([candidate("a", 0.002), candidate("b", 0.008)], device=CPU, rounds=3, warmup=0)
    assert calls == ["a", "b"] * 3
    assert rows[0]["ratio"] == 1.0
    assert rows[0]["median_ms"] >= 2.0
    assert rows[1]["median_ms"] >= 8.0


def test_a_slow_candidate_is_called_fewer_times(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.4)
    calls = []
    slow, quick = (Candidate(name, lambda s=s: lambda: calls.append(s) or time.sleep(s)) for name, s in SPEEDS.items())
    rows = measure([quick, slow], device=CPU, rounds=12, warmup=1)
    assert calls.count(SPEEDS["quick"]) == 13
    assert calls.count(SPEEDS["slow"]) == 4
    assert rows[1]["median_ms"] >= 200.0


def test_a_peer_that_fails_is_a_row_that_says_why():
    def fail():
        raise ImportError("No module named 'peer'")

    works = Candidate("works", lambda: lambda: None)
    rows = measure([works, Candidate("peer", fail)], device=CPU, rounds=1)
    assert rows[1] == {"name": "peer", "failure": "ImportError: No module named 'peer'"}
    assert "No module named 'peer'" in format_table(rows)


def test_an_error_that_cannot_be_computed_is_said_beside_the_time():
    (row,) = measure([Candidate("ours", lambda: lambda: None, lambda: 1 / 0)], device=CPU, rounds=1)
    assert row["median_ms"] >= 0.0
    assert row["failure"] == "ZeroDivisionError: division by zero"


def test_the_oracle_is_attention():
    generator = torch.Generator().manual_seed(0)
    query, key, value, upstream = (torch.randn(1, 2, 9, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    slopes = torch.tensor([0.3, 0.05], dtype=torch.float64, requires_grad=True)
    positions = torch.arange(9, dtype=torch.float64)
    lag = positions[:, None] - positions
    score = 0.5 * query @ key.mT - slopes[:, None, None] * lag
    output = score.masked_fill(lag < 0, float("-inf")).softmax(-1) @ value
    (expected,) = torch.autograd.grad((output * upstream).sum(), [slopes])
    assert_close(slope_gradient(query, key, value, upstream, slopes.detach(), 0.5, block=4), expected)
    prior = RecencyPrior(2)
    with torch.no_grad():
        prior.strength.copy_(slopes / torch.tensor(prior.unit_slopes))
    rows = causal_rows(query, key, value, torch.tensor([0, 3, 8]), prior, 0.5)
    assert_close(rows, output[0][:, [0, 3, 8]].detach(), tolerance=1e-6)


def test_a_device_that_fails_ends_the_samples_and_keeps_those_that_are_taken(monkeypatch):
    calls = []

    def run(name):
        calls.append(name)
        if len(calls) >= 5:  # in the second round: no call works from then on
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(timing, "_answers", lambda device: len(calls) < 5)
    candidates = [Candidate(name, lambda name=name: lambda: run(name)) for name in "abc"]
    rows = measure(candidates, device=CPU, rounds=9, warmup=0)
    assert calls == [*"abcab"]
    assert rows[1] == {"name": "b", "failure": "RuntimeError: an illegal memory access"}
    assert [row["ratio"] > 0 for row in (rows[0], rows[2])] == [True, True]


def test_a_device_that_fails_before_any_sample_leaves_rows_that_say_so(monkeypatch):
    monkeypatch.setattr(timing, "_answers", lambda device: False)
    rows = measure([Candidate("a", lambda: lambda: 1 / 0), Candidate("b", lambda: int)], device=CPU, warmup=0)
    assert [row["failure"] for row in rows] == [
        "ZeroDivisionError: division by zero",
        "not measured: the device failed before",
    ]


def test_what_was_measured_before_a_suite_failed_is_printed_and_stored(monkeypatch, tmp_path, capsys):
    def suite(config):
        yield {"name": "before", "median_ms": 1.5}
        raise RuntimeError("an illegal memory access")

    monkeypatch.setitem(SUITES, "layer", suite)
    assert main(["bench", "layer", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "before" in said.out
    error = "RuntimeError: an illegal memory access"
    assert said.err == f"eotattn bench: ended by {error}; the table has what was measured\n"
    with (tmp_path / "bench_layer.csv").open() as file:
        first, last = csv.DictReader(file)
    assert (first["name"], first["median_ms"], first["failure"]) == ("before", "1.5", "")
    assert (last["name"], last["failure"]) == ("eotattn", error)
    monkeypatch.setitem(SUITES, "layer", lambda config: iter([1 // 0]))
    with pytest.raises(ZeroDivisionError):
        main(["bench", "layer"])


def test_bench_on_the_command_line(capsys):
    assert main(["bench", "decode", "--rounds", "1"]) == 0
    assert "SDPA, appending to a cache" in capsys.readouterr().out


def test_the_oracle_of_gate_gradients_is_the_derivative():
    random = torch.Generator().manual_seed(0)
    sides = [torch.randn(1, 2, 11, 4, dtype=torch.float64, generator=random) for _ in range(4)]
    query, key, value, upstream = sides
    log_gates = (-torch.rand(2, 11, dtype=torch.float64, generator=random)).requires_grad_()
    rows = []
    for i in range(11):
        sums = [log_gates[:, j + 1 : i + 1].sum(-1) for j in range(i + 1)]
        score = 0.5 * (query[0, :, i : i + 1] @ key[0, :, : i + 1].mT)[:, 0] + torch.stack(sums, -1)
        rows.append((score.softmax(-1)[:, None] @ value[0, :, : i + 1])[:, 0])
    expected = torch.autograd.grad(torch.stack(rows, 1), log_gates, upstream[0])[0]
    assert_close(gate_gradient(query, key, value, upstream, log_gates.detach(), 0.5, block=4), expected)


def test_the_oracle_of_slope_gradients_knows_a_sink():
    query, key, value, upstream = (torch.randn(1, 2, 9, 3, dtype=torch.float64) for _ in range(4))
    slopes = torch.tensor([0.3, 1.2], dtype=torch.float64, requires_grad=True)
    lag = torch.arange(9)[:, None] - torch.arange(9)
    score = (0.5 * query @ key.mT - slopes[:, None, None] * lag).masked_fill(lag < 0, float("-inf"))
    weights = torch.cat([score, score.new_full((1, 2, 9, 1), 0.7)], -1).softmax(-1)[..., :-1]
    (expected,) = torch.autograd.grad(weights @ value, slopes, upstream)
    found = slope_gradient(query, key, value, upstream, slopes.detach(), 0.5, sink=0.7, block=4)
    assert_close(found, expected)


def test_gate_gradients_in_bfloat16_are_cured_by_the_bias_of_queries():
    config = Configuration(dtype="bfloat16")
    (cured,), (alone,) = (gate_errors(config, 1024, heads=4, is_cured=is_cured) for is_cured in (True, False))
    assert cured["value"] <= 0.05
    assert cured["worst_head"] <= 0.1
    assert cured["value"] <= 0.8 * alone["value"]
    assert gate_errors(Configuration(), 256, heads=4)[0]["worst_head"] <= 1e-3
