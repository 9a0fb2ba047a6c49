"""Settings of the whole test run."""

import os

import matplotlib as mpl
import torch

mpl.use("Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
