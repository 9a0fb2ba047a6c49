"""Experiments: tasks (data), networks, training and runs, and a file a figure, from its recipe to its picture."""

from eotattn.checks import check_installed

check_installed("eotattn.experiments", "experiments", "accelerate", "pandas", "scipy", "sklearn")
