"""KeyTablePrior: the contract, and its table."""

import torch
from tolerances import assert_close

from eotattn.attention import prior_attention
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


def test_a_mask_of_keys_that_differs_by_sample_beside_a_table():
    generator = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, 2, HEADS, LENGTH, 4, generator=generator, dtype=torch.float64)
    mask = torch.randn(2, 1, 1, LENGTH, generator=generator, dtype=torch.float64)
    prior = filled()
    score = query @ key.mT / 2 + mask + prior.table.detach().double()[:, None, :]
    output = prior_attention(query, key, value, prior=prior, attn_mask=mask, backend="sdpa")
    assert_close(output, score.softmax(-1) @ value)
