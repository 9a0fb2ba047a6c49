"""Settings of the whole test run."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one core each, in BLAS too, which reads this as it is loaded, and in children
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import matplotlib as mpl
import pytest
import torch

mpl.use("Agg")
# What trains takes the CPU, in this process and in those that it starts, unless the test is marked ``gpu``.
os.environ["ACCELERATE_USE_CPU"] = "true"


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none; Triton's interpreter stands in for one where a test allows it."""
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _training_takes_the_gpu_where_a_test_says_so(request, monkeypatch):
    if request.node.get_closest_marker("gpu"):
        monkeypatch.delenv("ACCELERATE_USE_CPU")
