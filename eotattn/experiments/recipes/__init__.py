"""Recipes: for every figure and scale, a frozen configuration. Nothing is trained here; a recipe is only read."""

from eotattn.experiments.recipes.ablations import AblationRecipe, ablations
from eotattn.experiments.recipes.copy_mixture import CopyMixtureRecipe, copy_mixture
from eotattn.experiments.recipes.dna import DnaRecipe, dna
from eotattn.experiments.recipes.language import LanguageRecipe, language
from eotattn.experiments.recipes.retrieval import RetrievalRecipe, retrieval
from eotattn.experiments.recipes.vision import VisionRecipe, vision

__all__ = [
    "AblationRecipe",
    "CopyMixtureRecipe",
    "DnaRecipe",
    "LanguageRecipe",
    "RetrievalRecipe",
    "VisionRecipe",
    "ablations",
    "copy_mixture",
    "dna",
    "language",
    "retrieval",
    "vision",
]
