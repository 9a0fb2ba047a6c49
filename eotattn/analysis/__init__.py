"""Analyse trained models: a model and texts, or attention maps, in; tables, figures and one page out."""

from eotattn.analysis.analysis_report import Analysis
from eotattn.analysis.byte_tokens import ByteTokenizer
from eotattn.analysis.checkpoints import SinkFormation, analyze_checkpoints, checkpoints_in
from eotattn.analysis.figures import prior_panels
from eotattn.analysis.findings import details, findings
from eotattn.analysis.head_kinds import head_kinds
from eotattn.analysis.model_comparison import ModelComparison, compare
from eotattn.analysis.run import analyze
from eotattn.analysis.samples import code_samples, prose_samples
from eotattn.analysis.texts import read_texts

__all__ = [
    "Analysis",
    "ByteTokenizer",
    "ModelComparison",
    "SinkFormation",
    "analyze",
    "analyze_checkpoints",
    "checkpoints_in",
    "code_samples",
    "compare",
    "details",
    "findings",
    "head_kinds",
    "prior_panels",
    "prose_samples",
    "read_texts",
]
