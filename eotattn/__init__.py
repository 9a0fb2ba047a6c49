"""eotattn: an entropic optimal transport analysis toolkit for attention.

The names below are the front door. The rooms behind it, from the ground up; each imports only from those below it::

    eotattn.checks        argument checks and their wording
    eotattn.provenance    tables, and where numbers come from
    eotattn.processes     what the processes of one run agree on
    eotattn.compat        private names of PyTorch and transformers
    eotattn.priors        trainable log-priors, of positions and of what tokens say, and the lanes that carry them
    eotattn.kernels       the fused kernels, tensors in and out
    eotattn.attention     prior_attention, explain, a cache; layers; statistics without weights
    eotattn.transport     TransportProblem -> solve -> TransportSolution; certificates, theorems, POT
    eotattn.diagnostics   heads, sinks, values, implicit priors; the table of equivalences
    eotattn.integrations  models of other libraries: capture, stored maps, attached priors, interventions
    eotattn.plotting      arrays in, matplotlib Axes out
    eotattn.analysis      analyze: a model and texts in; tables, figures and a page out
    eotattn.experiments   tasks, networks, training, and a file a figure, from recipe to picture
    eotattn.benchmarks    time, memory and error against peers
    eotattn.cli           the command ``eotattn``
    eotattn.testing       contract checks for a prior of your own

Example:
    >>> import torch
    >>> heads = torch.randn(1, 2, 5, 8)
    >>> prior_attention(heads, heads, heads, prior=goat_prior(2), is_causal=True).shape
    torch.Size([1, 2, 5, 8])
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from eotattn.attention import AttentionSinks, GoatAttention, PriorAttention, Rotary, explain, merge, prior_attention
from eotattn.priors import (
    AlibiPrior,
    ClassTokenPrior,
    DensePrior,
    ForgettingPrior,
    FourierPrior,
    GridPrior,
    GridTablePrior,
    KerplePrior,
    LogPrior,
    RecencyPrior,
    RelativeBiasPrior,
    SinkPrior,
    T5Prior,
    factorise,
    goat_prior,
    grid_positions,
    split_parameters,
)
from eotattn.transport import TransportProblem, TransportSolution, Tsallis, solve, with_dummy_key

if TYPE_CHECKING:
    from eotattn.analysis import analyze
    from eotattn.integrations import attach, intervene

    __version__: str

__all__ = [
    "AlibiPrior",
    "AttentionSinks",
    "ClassTokenPrior",
    "DensePrior",
    "ForgettingPrior",
    "FourierPrior",
    "GoatAttention",
    "GridPrior",
    "GridTablePrior",
    "KerplePrior",
    "LogPrior",
    "PriorAttention",
    "RecencyPrior",
    "RelativeBiasPrior",
    "Rotary",
    "SinkPrior",
    "T5Prior",
    "TransportProblem",
    "TransportSolution",
    "Tsallis",
    "__version__",
    "analyze",
    "attach",
    "explain",
    "factorise",
    "goat_prior",
    "grid_positions",
    "intervene",
    "merge",
    "prior_attention",
    "solve",
    "split_parameters",
    "with_dummy_key",
]


#: Rooms of the upper floors, which are imported when one of these names is asked for.
_LATER = {"analyze": "eotattn.analysis", "attach": "eotattn.integrations", "intervene": "eotattn.integrations"}


def __getattr__(name: str) -> Any:
    """What is made when it is first asked for: ``analyze`` needs matplotlib, ``__version__`` reads a file."""
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    if name == "__version__":
        try:
            return importlib.metadata.version("eotattn")
        except importlib.metadata.PackageNotFoundError:
            return "unknown (run from a folder, not installed)"
    raise AttributeError(f"module 'eotattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
