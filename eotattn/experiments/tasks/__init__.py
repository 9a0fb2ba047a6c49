"""Data of the experiments, one file a task; every batch is a function of a seed and a step."""

from eotattn.experiments.tasks.batches import IGNORED, Batch, step_generator
from eotattn.experiments.tasks.copy_mixture import CopyMixture
from eotattn.experiments.tasks.dna import DnaTask, IsochoreGenome, StoredGenome, gc_fraction, open_genome
from eotattn.experiments.tasks.images import ImageTask, open_images
from eotattn.experiments.tasks.isochores import IsochoreModel
from eotattn.experiments.tasks.language import LanguageTask, TextSplit, find_texts, split_by_file
from eotattn.experiments.tasks.retrieval import NEEDLE, PASSKEY, Haystack, RetrievalTask

__all__ = [
    "IGNORED",
    "NEEDLE",
    "PASSKEY",
    "Batch",
    "CopyMixture",
    "DnaTask",
    "Haystack",
    "ImageTask",
    "IsochoreGenome",
    "IsochoreModel",
    "LanguageTask",
    "RetrievalTask",
    "StoredGenome",
    "TextSplit",
    "find_texts",
    "gc_fraction",
    "open_genome",
    "open_images",
    "split_by_file",
    "step_generator",
]
