"""Analyse trained models: a model and texts, or attention maps, in; tables, figures and one page out."""

from eotattn.experiments.analysis.run import analyze
from eotattn.experiments.analysis.samples import code_samples, prose_samples
from eotattn.experiments.analysis.shards import is_first_process
from eotattn.experiments.analysis.summary import Analysis
from eotattn.experiments.analysis.texts import read_texts

__all__ = ["Analysis", "analyze", "code_samples", "is_first_process", "prose_samples", "read_texts"]
