"""Log-priors: the contract, a file a prior (grids: two), their algebra, and lanes, in which fused kernels carry them.

Conventions:

- Log-priors are in nats, positions in tokens. **A log-prior is free up to a constant of each row**, which softmax does
  not see: lanes use that freedom, ``dense`` states the natural form.
- **How exact lanes are.** Features of positions are computed in float64, once for equal constants. In a 16-bit kernel
  every factor is written in as many numbers as a ``tolerance`` in nats asks for, by default about what the rounding of
  content costs anyway; ``Lanes.error_bound`` states the rest. Positions count from the middle of the queries, so that
  numbers are small; float32 slopes at a distance of 65 536 tokens are off by about 1e-3 nats, as is every float32
  product of that size.
- **Parameters stay float32** whatever dtype the model is cast to; constants belong to the constructor and are in no
  state dict. :func:`split_parameters` gives priors a learning rate of their own.
- Recency is directional, ``-slope * (i - j)``: use it under a causal mask. Its slopes are never negative.
- u(j), the part of the key alone, is linear in fixed features (the paper uses a small network): its neutral start is
  exactly zero, every weight has a gradient from the first step, and it never depends on the current length. In the
  default form of :func:`goat_prior` it is constant beyond ``length_scale``.
"""

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
