"""The one list of prior constructors: a new prior adds an entry, and runs the whole contract."""

import math

import torch

from eotattn.priors import (
    AlibiPrior,
    ClassTokenPrior,
    DensePrior,
    FourierPrior,
    GridKeyPrior,
    GridPrior,
    GridTablePrior,
    HeadsPrior,
    JoinedPrior,
    KerplePrior,
    KeyTablePrior,
    RecencyPrior,
    RelativeBiasPrior,
    ScaledPrior,
    SinkPrior,
    T5Prior,
    TransposedPrior,
    goat_prior,
)

HEADS = 3


def off_neutral(prior, *, seed=0, size=0.7):
    """Move every parameter away from its start by a random step; returns the prior."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(size * torch.rand(parameter.shape, generator=generator) + 0.05)
            flip = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.copy_(torch.where(flip, -parameter, parameter))
    return prior


def recency(init="alibi", mean_lags=None):
    """Slopes off ALiBi's powers of two, so that no product is exact by luck."""
    prior = RecencyPrior(HEADS, init, mean_lags)
    with torch.no_grad():
        prior.strength.copy_(torch.tensor([1.3, 0.4, 2.2]))
    return prior


def matrix(*, masked=False):
    """A given matrix with more rows and columns than the contract's positions."""
    values = torch.randn(HEADS, 9, 11, generator=torch.Generator().manual_seed(5))
    if masked:
        values[:, :, 3] = -math.inf
        values[1, 4] = -math.inf
    return values


def fourier(seed=0):
    return off_neutral(FourierPrior(HEADS, 5, 3.0, 700.0), seed=seed)


#: name -> (constructor, names of the checks that it does not claim). One line a prior.
CASES = {
    "fourier": (fourier, ()),
    "recency": (recency, ()),
    "recency neutral": (lambda: recency("neutral"), ()),
    "recency of mean lags": (lambda: recency(mean_lags=(1.5, 2000.0, 60.0)), ()),
    "sink": (lambda: off_neutral(SinkPrior(HEADS, 3, length_scale=40.0)), ()),
    "sink with a horizon": (lambda: off_neutral(SinkPrior(HEADS, 3, length_scale=40.0, horizon=4.5)), ()),
    "sink without waves": (lambda: off_neutral(SinkPrior(HEADS, 0, length_scale=40.0)), ()),
    "table": (lambda: off_neutral(RelativeBiasPrior(HEADS, max_lag=3)), ()),
    "alibi": (lambda: AlibiPrior(HEADS), ()),
    "t5": (lambda: off_neutral(T5Prior(HEADS, 12, 9)), ()),
    "t5 causal": (lambda: off_neutral(T5Prior(HEADS, 5, 6, bidirectional=False)), ()),
    "kerple": (lambda: off_neutral(KerplePrior(HEADS)), ()),
    "kerple power": (lambda: off_neutral(KerplePrior(HEADS, "power")), ()),
    "key table": (lambda: off_neutral(KeyTablePrior(HEADS, length=4)), ()),
    "given": (lambda: DensePrior(matrix()), ("reset",)),
    "given with -inf": (lambda: DensePrior(matrix(masked=True)), ("reset",)),
    "given and trained": (lambda: off_neutral(DensePrior(matrix(), trainable=True)), ("start",)),
    "transposed": (lambda: TransposedPrior(fourier(7) + recency()), ()),
    "sum with a transposed": (lambda: fourier() + TransposedPrior(off_neutral(SinkPrior(HEADS, 0, 40.0))), ("start",)),
    "grid": (lambda: GridPrior(fourier(1), off_neutral(FourierPrior(HEADS, 2, 4.0, 30.0), seed=2)), ()),
    "grid of recencies": (lambda: GridPrior(recency(), recency()), ()),
    "grid of tables": (lambda: GridPrior(off_neutral(RelativeBiasPrior(HEADS, 2)), fourier()), ()),
    "grid lag table": (lambda: off_neutral(GridTablePrior(HEADS, 3, 2)), ()),
    "grid lag table, one row": (lambda: off_neutral(GridTablePrior(HEADS, 1, 65)), ()),
    "grid key table": (lambda: off_neutral(GridKeyPrior(HEADS, 3, 2)), ()),
    "class token": (lambda: off_neutral(ClassTokenPrior(HEADS)), ()),
    "vit": (lambda: GridPrior(fourier(3), fourier(4)) + off_neutral(ClassTokenPrior(HEADS)), ()),
    "goat": (lambda: off_neutral(goat_prior(HEADS, num_frequencies=3, length_scale=50.0)), ()),
    "goat neutral": (lambda: off_neutral(goat_prior(HEADS, num_frequencies=3, init="neutral")), ()),
    "goat of the paper": (lambda: off_neutral(goat_prior(HEADS, form="paper", num_frequencies=3)), ()),
    "shared": (lambda: HeadsPrior(off_neutral(goat_prior(1, num_frequencies=2)), [0] * HEADS), ()),
    "shared grid": (
        lambda: HeadsPrior(GridPrior(*(off_neutral(FourierPrior(1, 2, 4.0, 30.0)) for _ in range(2))), [0] * HEADS),
        (),
    ),
    "some heads": (lambda: off_neutral(goat_prior(5, num_frequencies=2)).heads([4, 0, 3]), ("start",)),
    "joined": (lambda: JoinedPrior(off_neutral(RecencyPrior(1)), off_neutral(goat_prior(2, num_frequencies=2))), ()),
    "joined with a table": (lambda: JoinedPrior(off_neutral(RelativeBiasPrior(2, 3)), off_neutral(SinkPrior(1))), ()),
    "three axes": (
        lambda: (
            GridPrior(recency(), fourier(5), off_neutral(KeyTablePrior(HEADS, 4)))
            + off_neutral(ClassTokenPrior(HEADS, 3))
        ),
        (),
    ),
    "learnable multiple": (
        lambda: off_neutral(ScaledPrior(off_neutral(FourierPrior(HEADS, 3)), 0.6, learnable=True)),
        ("start",),
    ),
    "multiple a head": (lambda: off_neutral(goat_prior(HEADS, num_frequencies=2)) * (0.7, -1.1, 0.4), ()),
    "multiple": (lambda: 1.7 * off_neutral(goat_prior(HEADS, num_frequencies=2)), ()),
    "sum with a table": (lambda: recency() + off_neutral(RelativeBiasPrior(HEADS, 4)), ()),
    "sum with a given": (lambda: fourier() + DensePrior(matrix()), ("reset",)),
}
