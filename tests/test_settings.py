"""The settings of the test run do what they are for."""

import subprocess
import sys
import warnings

import pytest
import torch

from eotattn.experiments.device import training_device


@pytest.mark.parametrize(
    "module", ["eotattn", "eotattn.checks", "eotattn.analysis.run", "test_cli", "attention.test_cache"]
)
def test_warnings_that_point_here_are_errors(module):
    with pytest.raises(FutureWarning, match="old"):
        warnings.warn_explicit("old", FutureWarning, "file.py", 1, module=module)


@pytest.mark.parametrize("module", ["accelerate.state", "torch.cuda", "eotattn_of_others", "ot"])
def test_warnings_between_other_libraries_are_theirs(module):
    with warnings.catch_warnings(record=True) as heard:
        warnings.warn_explicit("old", FutureWarning, "file.py", 1, module=module)
    assert len(heard) == 1


def test_training_takes_the_cpu_on_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training_device() == torch.device("cpu")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    assert training_device() == torch.device("cuda")


def test_so_do_the_processes_that_tests_start():
    code = "import os; print(os.environ['ACCELERATE_USE_CPU'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "true\n"


@pytest.mark.gpu
def test_a_gpu_test_trains_on_the_gpu():
    assert training_device() == torch.device("cuda")
