"""Settings of the whole test run."""

import base64
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one core each, in BLAS too, which reads this as it is loaded, and in children
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import matplotlib as mpl
import pytest
import torch
from matplotlib.figure import Figure

mpl.use("Agg")
#: One white pixel.
BLANK = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mP8/x8AAwMCAO+ip1sAAAAASUVORK5CYII=")
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


@pytest.fixture
def drawn():
    """Asked for by a test of an analysis whose figures are drawn."""


@pytest.fixture(autouse=True)
def _figures_of_analyses_are_blank(request, monkeypatch):
    """They are made, but only drawn where a test asks for that: it takes nine tenths of the time of a report."""
    if request.path.parent.name == "analysis" and "drawn" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(BLANK))
