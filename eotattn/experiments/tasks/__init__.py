"""Data of the experiments, one file a task; every batch is a function of a seed and a step."""

from eotattn.experiments.tasks.batches import Batch, step_generator
from eotattn.experiments.tasks.copy_mixture import CopyMixture
from eotattn.experiments.tasks.language import LanguageTask, TextSplit, find_texts, split_by_file

__all__ = [
    "Batch",
    "CopyMixture",
    "LanguageTask",
    "TextSplit",
    "find_texts",
    "split_by_file",
    "step_generator",
]
