"""KeyTablePrior: the contract, and its table."""

import torch

from eotattn.priors.key_table import KeyTablePrior
from eotattn.testing import check_prior

HEADS, LENGTH = 3, 6


def filled():
    prior = KeyTablePrior(HEADS, LENGTH)
    with torch.no_grad():
        prior.table.copy_(torch.randn(HEADS, LENGTH, generator=torch.Generator().manual_seed(0)))
    return prior


def test_contract():
    check_prior(filled)


def test_entries_by_position_and_flat_beyond():
    prior = filled()
    dense = prior.dense(torch.tensor([0, 9]), torch.tensor([-2, 0, 4, 5, 30])).detach()
    for row in (0, 1):
        assert torch.equal(dense[:, row], prior.table.detach()[:, [0, 0, 4, 5, 5]])
    assert prior.num_lanes() == 1
