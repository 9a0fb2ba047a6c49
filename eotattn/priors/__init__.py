"""Log-priors: the contract, one file a prior, and their factorisation into lanes."""

from eotattn.priors.base import LogPrior, ScaledPrior, ScoreMod, SumPrior
from eotattn.priors.expansion import Expansion, Form
from eotattn.priors.fourier import FourierPrior
from eotattn.priors.given import DensePrior
from eotattn.priors.goat import goat_prior, num_local_heads
from eotattn.priors.grid import ClassTokenPrior, GridPrior, grid_positions
from eotattn.priors.grid_tables import GridKeyPrior, GridTablePrior
from eotattn.priors.key_table import KeyTablePrior
from eotattn.priors.lanes import LaneFactors, Lanes
from eotattn.priors.one_for_all import SharedPrior
from eotattn.priors.parameters import split_parameters
from eotattn.priors.recency import RecencyPrior, alibi_slopes
from eotattn.priors.sink import SinkPrior
from eotattn.priors.table import TablePrior

__all__ = [
    "ClassTokenPrior",
    "DensePrior",
    "Expansion",
    "Form",
    "FourierPrior",
    "GridKeyPrior",
    "GridPrior",
    "GridTablePrior",
    "KeyTablePrior",
    "LaneFactors",
    "Lanes",
    "LogPrior",
    "RecencyPrior",
    "ScaledPrior",
    "ScoreMod",
    "SharedPrior",
    "SinkPrior",
    "SumPrior",
    "TablePrior",
    "alibi_slopes",
    "goat_prior",
    "grid_positions",
    "num_local_heads",
    "split_parameters",
]
