"""Experiments: tasks (data), networks, recipes (frozen configurations), training, studies and results."""

from eotattn.checks import check_installed

check_installed("eotattn.experiments", "experiments", "accelerate", "scipy", "sklearn")
