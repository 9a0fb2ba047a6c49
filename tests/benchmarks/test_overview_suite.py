"""The overview measures every figure that it promises, and one part that fails costs the others nothing."""

import importlib

import pytest

from eotattn.benchmarks.suites.configuration import configure

suite = importlib.import_module("eotattn.benchmarks.suites.overview")  # the package's attribute is the function
SMALL = configure("cpu", "float32", "small", rounds=1)


def test_a_part_that_fails_is_a_row_and_the_others_are_measured(monkeypatch):
    def fails(config, length):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(suite, "output_errors", fails)
    rows = list(suite.overview(SMALL))
    failed = [row for row in rows if "failure" in row and "flash-linear-attention" not in row["name"]]
    assert failed == [{"quantity": "precision", "name": "eotattn", "failure": "RuntimeError: no such kernel"}]
    assert {row["quantity"] for row in rows} == {
        *("precision", "slope gradient", "decode", "layer", "training step", "seconds")
    }
    for quantity in ("decode", "layer", "training step"):
        ratios = [row["ratio"] for row in rows if row["quantity"] == quantity and "failure" not in row]
        assert len(ratios) >= 3
        assert ratios[0] == 1.0
        assert min(ratios) > 0


def test_errors_are_those_of_the_dtype_not_of_the_configuration():
    rows = suite._precision(SMALL)
    outputs = {row["name"]: row for row in rows if row["quantity"] == "output error"}
    assert outputs["SDPA, no prior"]["value"] > 1e-4  # bfloat16, not float32
    assert outputs["eotattn, GOAT"]["lanes"] < outputs["eotattn, GOAT, tight tolerance"]["lanes"]
    assert outputs["eotattn, GOAT, tight tolerance"]["value"] < 2 * outputs["SDPA, no prior"]["value"]
    assert {row["dtype"] for row in rows if row["quantity"] == "total variation"} == {"bfloat16", "float16"}


def test_slope_gradients_are_measured_where_positions_are_large():
    rows = [row for row in suite._gradients(SMALL) if row["dtype"] == "float32"]
    assert {row["first"] for row in rows} == {0, 1_000_000}
    assert all(0 < row["worst_head"] < 1e-3 for row in rows)


@pytest.mark.parametrize("name", ["eotattn, GOAT, reserved", "RoPE in plain PyTorch"])
def test_a_training_step_trains(name):
    training = importlib.import_module("eotattn.benchmarks.suites.training_step")
    step = training._step(training.attention_layers(training.SMALL)[name], training.SMALL, SMALL)
    losses = [float(step()) for _ in range(30)]
    assert losses[-1] < losses[0]
