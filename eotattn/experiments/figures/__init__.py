"""The figures as printed: panels put together from studies with the plots of :mod:`eotattn.plotting`."""

from eotattn.experiments.figures.ablations import draw_ablations
from eotattn.experiments.figures.captions import VARIANT_NAMES
from eotattn.experiments.figures.copy_mixture import draw_copy_mixture
from eotattn.experiments.figures.dna import draw_dna
from eotattn.experiments.figures.language import draw_language
from eotattn.experiments.figures.retrieval import draw_retrieval
from eotattn.experiments.figures.vision import POSITION_NAMES, draw_vision

__all__ = [
    "POSITION_NAMES",
    "VARIANT_NAMES",
    "draw_ablations",
    "draw_copy_mixture",
    "draw_dna",
    "draw_language",
    "draw_retrieval",
    "draw_vision",
]
