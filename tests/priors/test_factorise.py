"""Factorisations: ranks known by hand, errors against the dense log-prior, lanes in every dtype, refusals."""

import copy
import math
import pickle

import pytest
import torch
from priors.cases import HEADS, off_neutral
from tolerances import assert_close

from eotattn import prior_attention
from eotattn.priors import (
    AlibiPrior,
    DensePrior,
    GridTablePrior,
    KerplePrior,
    RecencyPrior,
    RelativeBiasPrior,
    factorise,
    grid_positions,
)

AT = torch.arange(60)


def generic(rank, queries=40, keys=30):
    """A log-prior that is a sum of ``rank`` products, the same factors in all heads."""
    generator = torch.Generator().manual_seed(0)
    left, right, weights = (torch.randn(n, rank, generator=generator).double() for n in (queries, keys, HEADS))
    return torch.einsum("qr,kr,hr->hqk", left, right, weights)


@pytest.mark.parametrize("rank", [1, 5, 30])
def test_the_rank_of_a_sum_of_products_is_found(rank):
    matrix = generic(rank)
    found = factorise(DensePrior(matrix), torch.arange(40), key_positions=torch.arange(30), tolerance=1e-9)
    assert found.rank == rank
    assert found.error <= 1e-9


def test_slopes_have_rank_two_and_swin_windows_rank_49():
    assert factorise(RecencyPrior(HEADS), AT, tolerance=1e-6).rank == 2
    cells = grid_positions(7, 7)
    found = factorise(off_neutral(GridTablePrior(HEADS, 7, 7), size=2.0), cells, tolerance=1e-6)
    assert found.rank == 49
    assert_close(
        found.prior.dense(cells, cells), off_neutral(GridTablePrior(HEADS, 7, 7), size=2.0).dense(cells, cells)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_certificate_holds_and_lanes_carry_what_it_certifies(dtype):
    prior = off_neutral(KerplePrior(HEADS))
    found, exact = factorise(prior, AT, tolerance=1e-3), prior.dense(AT, AT, dtype=torch.float64).detach()
    error = (found.prior.dense(AT, AT, dtype=torch.float64) - exact).abs().max()
    assert float(error) == pytest.approx(found.error, rel=1e-6)
    assert found.error <= 1e-3
    assert factorise(prior, AT, tolerance=1e-3, max_rank=found.rank).rank == found.rank
    with pytest.raises(ValueError, match=f"needs rank {found.rank}"):
        factorise(prior, AT, tolerance=1e-3, max_rank=found.rank - 1)
    lanes = found.prior.lanes(AT, AT, dtype=dtype, tolerance=1e-4)
    assert float((lanes.dense().double() - found.prior.dense(AT, AT, dtype=torch.float64)).abs().max()) <= 1e-3
    rows = [weights.softmax(-1) for weights in (exact, found.prior.dense(AT, AT, dtype=torch.float64))]
    assert float((rows[0] - rows[1]).abs().sum(-1).max() / 2) <= found.total_variation_bound
    assert found.total_variation_bound == math.tanh(found.error / 2)


def test_it_serves_a_fused_call_and_knows_its_positions():
    prior, order = off_neutral(KerplePrior(HEADS)), torch.randperm(60, generator=torch.Generator().manual_seed(1))
    found = factorise(prior, order * 3, tolerance=1e-6)
    query, key, value = torch.randn(3, 2, HEADS, 60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    at = {"query_positions": AT * 3, "key_positions": AT * 3}
    ours = prior_attention(query, key, value, prior=found.prior, backend="sdpa", **at)
    assert_close(ours, prior_attention(query, key, value, prior=prior, backend="reference", **at), tolerance=1e-6)
    with pytest.raises(ValueError, match="key_positions must be among those that were factorised"):
        prior_attention(query, key, value, prior=found.prior, query_positions=AT * 3, key_positions=AT * 3 + 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda prior: pickle.loads(pickle.dumps(prior))])
def test_copies_are_equal(copied):
    prior = factorise(off_neutral(KerplePrior(HEADS)), AT, tolerance=1e-2).prior
    assert torch.equal(copied(prior).dense(AT, AT), prior.dense(AT, AT))


BAD = {
    "rank": (lambda: factorise(off_neutral(RelativeBiasPrior(2, 40)), AT, tolerance=1e-6, max_rank=20), "needs rank"),
    "precision": (lambda: factorise(AlibiPrior(2), AT, tolerance=1e-18, max_rank=60), "no rank reaches it"),
    "lanes": (lambda: factorise(AlibiPrior(2), AT, tolerance=1e-3, max_rank=129), "max_rank must be at most 128"),
    "tolerance": (lambda: factorise(AlibiPrior(2), AT, tolerance=0.0), "factorise: tolerance must be positive"),
    "no prior": (lambda: factorise(3, AT, tolerance=1.0), "factorise: prior must be a LogPrior"),
    "twice": (lambda: factorise(AlibiPrior(2), AT // 2, tolerance=1.0), "be one row of distinct positions"),
    "hidden": (lambda: factorise(DensePrior(torch.zeros(1, 9, 9).log()), AT[:9], tolerance=1.0), "finite at all pairs"),
    "long": (lambda: factorise(AlibiPrior(1), torch.arange(5000), tolerance=1.0), "pairs at most; got 25000000"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_one_line(name):
    build, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
