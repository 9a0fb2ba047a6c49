"""Analyse trained models: a model and texts, or attention maps, in; tables, figures and one page out."""

from eotattn.experiments.analysis.byte_tokens import ByteTokenizer
from eotattn.experiments.analysis.figures import prior_panels
from eotattn.experiments.analysis.run import analyze
from eotattn.experiments.analysis.samples import code_samples, prose_samples
from eotattn.experiments.analysis.shards import is_first_process
from eotattn.experiments.analysis.summary import Analysis
from eotattn.experiments.analysis.texts import read_texts

__all__ = [
    "Analysis",
    "ByteTokenizer",
    "analyze",
    "code_samples",
    "is_first_process",
    "prior_panels",
    "prose_samples",
    "read_texts",
]
