"""Suites over several processes: the same training as in one, and a process that fails is said."""

import pytest
import torch.distributed as dist

from eotattn.benchmarks.report import bench
from eotattn.benchmarks.suites import configure
from eotattn.benchmarks.suites.launch import measure_together
from eotattn.benchmarks.suites.parallel import NAMES

CONFIG = configure("cpu", "float32", "small", rounds=3)


@pytest.mark.slow
def test_processes_share_the_training_of_one():
    *steps, link = bench("parallel", CONFIG).rows
    assert [(row["name"], row["processes"]) for row in steps] == [(name, count) for name in NAMES for count in (1, 2)]
    for alone, shared in zip(steps[::2], steps[1::2], strict=True):
        assert shared["error"] <= 1e-5
        assert shared["efficiency"] == alone["median_ms"] / (2 * shared["median_ms"])
        assert shared["tokens_per_second"] == pytest.approx(
            shared["batch"] * shared["length"] / shared["median_ms"] * 1e3
        )
        assert alone["batch"] == shared["batch"] == 4
    assert link["bytes"] == 4 * steps[0]["parameters"]
    assert link["bytes_per_second"] == pytest.approx(
        link["bytes"] / link["median_ms"] * 1e3
    )  # two of them send it once


def failing_second(config):
    """Two rows of the first process; the second one fails after the first row."""
    yield {"name": "first"}
    dist.barrier()
    if dist.get_rank() == 1:
        raise OSError("no more memory")
    dist.barrier()
    yield {"name": "never"}


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_and_leaves_the_rows_before():
    first, last = measure_together(failing_second, CONFIG, 2)
    assert first == {"name": "first"}
    assert last["name"] == "eotattn, 2 processes"
    assert "no more memory" in last["failure"] or "Connection" in last["failure"]


def test_one_process_is_this_one():
    assert list(measure_together(lambda config: [{"name": config.device}], CONFIG, 1)) == [{"name": "cpu"}]
