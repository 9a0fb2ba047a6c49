"""What features are like is found from their values: exceptions anywhere below 65 536 count."""

import pytest
import torch
from tolerances import centre_rows
from torch import nn

from eotattn.priors import BilinearPrior, GridPrior, RecencyPrior
from eotattn.priors.probing import Span, bits_of, probe

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class AllKeysButOne(BilinearPrior):
    """One value at all keys but one."""

    def __init__(self, where, there, elsewhere):
        super().__init__(2)
        self.where, self.there, self.elsewhere = where, there, elsewhere
        self.height = nn.Parameter(torch.tensor([1.0, -0.7]))

    def query_features(self, positions):
        return torch.ones_like(positions).unsqueeze(-1)

    def key_features(self, positions):
        there, elsewhere = (torch.full_like(positions, value) for value in (self.there, self.elsewhere))
        return torch.where(positions == self.where, there, elsewhere).unsqueeze(-1)

    def weights(self):
        return self.height[:, None, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("there", "elsewhere"), [(1.0, 0.0), (300.0, 0.0), (0.3, 0.0), (0.0, 1.0), (0.5, 1.0)])
@pytest.mark.parametrize("where", [4, 7, 5000, 60_001])
def test_one_exceptional_key_is_not_overlooked(where, there, elsewhere, dtype):
    """An indicator is zero almost everywhere, and its complement is one: neither may be taken for a constant."""
    prior = AllKeysButOne(where, there, elsewhere)
    queries, keys = torch.tensor([0, 3]), torch.arange(where - 3, where + 4)
    lanes = prior.lanes(queries, keys, dtype=dtype)
    heights = prior.height.detach().double()[:, None, None]
    exact = (heights * torch.where(keys == where, torch.tensor(there, dtype=torch.float64), elsewhere)).expand(2, 2, 7)
    error = (centre_rows(lanes.dense().double().detach()) - centre_rows(exact)).abs().max()
    assert error <= 2 * lanes.error_bound
    assert lanes.error_bound <= 1e-4 * max(1.0, there)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coordinates_of_large_grids_are_exact(dtype):
    """300 is no number of bfloat16."""
    prior = GridPrior(RecencyPrior(2), RecencyPrior(2))
    cells = torch.stack([torch.arange(290, 310), torch.arange(1000, 1020)], dim=-1)
    slopes = torch.tensor([1 / 16, 1 / 256], dtype=torch.float64)[:, None, None]
    lag = (cells[:, None] - cells[None]).double().sum(-1)
    lanes = prior.lanes(cells, cells, dtype=dtype).dense().double().detach()
    assert (centre_rows(lanes) - centre_rows(-slopes * lag)).abs().max() <= 1e-3


def test_facts_of_the_recency_prior():
    one, position = probe(RecencyPrior(2).terms()[0].features.name, "key", 1, Span())
    assert (one.is_one, one.is_whole, one.largest) == (True, True, 1.0)
    assert (position.is_one, position.is_whole, position.largest) == (False, True, 65_535.0)
    fractions = probe(RecencyPrior(2).terms()[0].features.name, "key", 1, Span(whole=False))
    assert [fact.is_whole for fact in fractions] == [True, False]


def test_bits_of_positions_come_in_steps():
    assert [bits_of(n) for n in (0, 65_535, 65_536, -65_536, 2**24 - 1, 2**24)] == [16, 16, 24, 24, 24, 32]
