"""Experiments: tasks (data), networks, recipes (frozen configurations), training, studies and results."""
