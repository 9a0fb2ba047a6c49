"""The figures as printed: panels put together from studies with the plots of :mod:`eotattn.plotting`."""

from eotattn.experiments.figures.ablations import draw_ablations
from eotattn.experiments.figures.captions import VARIANT_NAMES, title_panels
from eotattn.experiments.figures.copy_mixture import draw_copy_mixture
from eotattn.experiments.figures.language import draw_language
from eotattn.experiments.figures.retrieval import draw_retrieval

__all__ = ["VARIANT_NAMES", "draw_ablations", "draw_copy_mixture", "draw_language", "draw_retrieval", "title_panels"]
