"""Log-priors: the contract, one file a prior, their algebra, and the lanes in which fused kernels carry them."""

from eotattn.priors.alibi import AlibiPrior
from eotattn.priors.base import HeadsPrior, LogPrior, ScaledPrior, ScoreMod, SumPrior
from eotattn.priors.bilinear import BilinearPrior
from eotattn.priors.dense_prior import DensePrior
from eotattn.priors.factorise import Factorisation, FactorisedPrior, factorise
from eotattn.priors.forgetting import ForgettingPrior, running_sums
from eotattn.priors.fourier import FourierPrior
from eotattn.priors.goat import goat_prior, num_local_heads
from eotattn.priors.grid import ClassTokenPrior, GridPrior, grid_positions
from eotattn.priors.grid_tables import GridKeyPrior, GridTablePrior
from eotattn.priors.joined_prior import JoinedPrior
from eotattn.priors.kerple import KerplePrior
from eotattn.priors.key_table import KeyTablePrior
from eotattn.priors.lanes import Lanes
from eotattn.priors.parameters import split_parameters
from eotattn.priors.query_gain import QueryGainPrior
from eotattn.priors.reading import Reading, Tokens
from eotattn.priors.recency import RecencyPrior, alibi_slopes
from eotattn.priors.relative_bias import RelativeBiasPrior
from eotattn.priors.sink import SinkPrior
from eotattn.priors.t5 import T5Prior
from eotattn.priors.terms import Features, KeyTerm, Term
from eotattn.priors.transposed import TransposedPrior

__all__ = [
    "AlibiPrior",
    "BilinearPrior",
    "ClassTokenPrior",
    "DensePrior",
    "Factorisation",
    "FactorisedPrior",
    "Features",
    "ForgettingPrior",
    "FourierPrior",
    "GridKeyPrior",
    "GridPrior",
    "GridTablePrior",
    "HeadsPrior",
    "JoinedPrior",
    "KerplePrior",
    "KeyTablePrior",
    "KeyTerm",
    "Lanes",
    "LogPrior",
    "QueryGainPrior",
    "Reading",
    "RecencyPrior",
    "RelativeBiasPrior",
    "ScaledPrior",
    "ScoreMod",
    "SinkPrior",
    "SumPrior",
    "T5Prior",
    "Term",
    "Tokens",
    "TransposedPrior",
    "alibi_slopes",
    "factorise",
    "goat_prior",
    "grid_positions",
    "num_local_heads",
    "running_sums",
    "split_parameters",
]
