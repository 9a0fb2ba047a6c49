"""Given matrices one a sample, trained ones, and priors of queries."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from attention.oracles import attention, normal
from priors.cases import off_neutral
from tolerances import assert_close
from torch import nn

from eotattn import prior_attention
from eotattn.priors import (
    DensePrior,
    ForgettingPrior,
    FourierPrior,
    HeadsPrior,
    KeyTablePrior,
    RecencyPrior,
    SinkPrior,
    TransposedPrior,
)
from eotattn.priors.terms import FEATURES
from eotattn.transport import TransportProblem

B, H, Q, K, D = 3, 4, 5, 7, 8
CONTENT = [normal(B, H, length, D, seed=n) for n, length in enumerate((Q, K, K))]
MATRIX = normal(B, H, Q + 2, K + 1, seed=5)
COMBINED = {
    "alone": (lambda given: given, lambda matrix, other: matrix),
    "in a sum": (lambda given: given + RecencyPrior(H), lambda matrix, other: matrix + other),
    "in a multiple": (lambda given: given * (0.5, 2.0, 0.0, -1.0), lambda matrix, other: matrix * FACTORS),
    "some heads": (lambda given: HeadsPrior(given, [1, 1, 0, 3]), lambda matrix, other: matrix[:, [1, 1, 0, 3]]),
}
FACTORS = torch.tensor([0.5, 2.0, 0.0, -1.0], dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize("name", COMBINED)
def test_a_matrix_a_sample(name):
    combine, oracle = COMBINED[name]
    at = (torch.arange(1, Q + 1), torch.arange(K))
    recency = RecencyPrior(H).dense(*at, dtype=torch.float64).detach()
    log_prior = oracle(MATRIX[:, :, 1 : Q + 1, :K], recency)
    expected, _ = attention(*CONTENT, log_prior=log_prior)
    assert_close(prior_attention(*CONTENT, prior=combine(DensePrior(MATRIX)), query_positions=1), expected)
    positions = torch.stack([at[1].roll(n) for n in range(B)])
    picked = torch.stack([MATRIX[b, :, 1 : Q + 1][..., positions[b]] for b in range(B)])
    assert_close(DensePrior(MATRIX).dense(at[0], positions, dtype=torch.float64), picked)


def test_a_matrix_trains_where_keys_are_admissible():
    matrix = MATRIX[:, :, :Q, :K].clone()
    matrix[1, 2, 3, 4] = -math.inf
    prior, upstream = DensePrior(matrix, trainable=True), normal(B, H, Q, D, seed=6)
    assert [name for name, _ in prior.named_parameters()] == ["matrix"]
    prior_attention(*CONTENT, prior=prior).backward(upstream)
    exact = matrix.clone().requires_grad_()
    output, _ = attention(*CONTENT, log_prior=exact)
    assert_close(prior.matrix.grad, torch.autograd.grad(output, exact, upstream)[0])
    with torch.no_grad():
        prior.matrix.add_(1.0)
    twin = copy.deepcopy(prior)
    twin.reset_parameters()
    assert bool((twin.matrix == matrix).all())


def test_a_given_matrix_is_a_buffer_unless_it_trains():
    assert not list(DensePrior(MATRIX).parameters())
    assert list(DensePrior(MATRIX).state_dict()) == ["matrix"] == list(DensePrior(MATRIX, trainable=True).state_dict())


def test_a_transposed_prior_exchanges_queries_and_keys():
    prior, at = off_neutral(FourierPrior(H, 3)) + RecencyPrior(H), (torch.arange(Q), torch.arange(3, K + 3))
    dense = TransposedPrior(prior).dense(*at, dtype=torch.float64)
    assert_close(dense, prior.dense(*at[::-1], dtype=torch.float64).mT.detach())
    expected, _ = attention(*CONTENT, log_prior=dense.detach())
    output = prior_attention(*CONTENT, prior=TransposedPrior(prior), key_positions=3, backend="sdpa")
    assert_close(output, expected)


@pytest.mark.parametrize("make", [lambda: SinkPrior(H, 2, 9.0), lambda: KeyTablePrior(H, 5)])
def test_a_prior_of_queries_is_seen_by_sinks_and_by_transport_alone(make):
    of_keys = off_neutral(make())
    prior, sinks = TransposedPrior(of_keys), normal(H, seed=3)
    assert_close(prior_attention(*CONTENT, prior=prior), prior_attention(*CONTENT))
    score = CONTENT[0] @ CONTENT[1].mT / D**0.5 + of_keys.dense(torch.arange(1), torch.arange(Q)).double().mT
    weights = torch.cat([score, sinks[None, :, None, None].expand(B, H, Q, 1)], -1).softmax(-1)[..., :K]
    output = prior_attention(*CONTENT, prior=prior, sinks=sinks)
    assert_close(output, (weights @ CONTENT[2]).detach(), tolerance=1e-6)
    dense = prior.dense(torch.arange(Q), torch.arange(K), dtype=torch.float64).detach()
    assert float(dense.std(-1).max()) < 1e-12
    assert float(dense.std(-2).min()) > 1e-3
    problem = TransportProblem(CONTENT[0][0] @ CONTENT[1][0].mT, log_prior=dense)
    assert problem.log_prior.shape == (H, Q, K)


def test_a_prior_that_reads_tokens_is_not_transposed():
    with pytest.raises(ValueError, match="TransposedPrior: prior must read positions alone; got 'ForgettingPrior'"):
        TransposedPrior(ForgettingPrior(8, H))
    with pytest.raises(TypeError, match="TransposedPrior: prior must be a LogPrior"):
        TransposedPrior(nn.Linear(2, 2))


def test_an_unpickled_prior_names_its_features_before_a_graph_is_traced(monkeypatch):
    prior, x = TransposedPrior(RecencyPrior(2)), torch.ones(1, 2, 5, 4)
    expected = prior_attention(x, x, x, prior=prior, sinks=torch.zeros(2))
    stored, (term,) = pickle.dumps(prior), prior.terms()
    monkeypatch.delitem(FEATURES, term.features.name)  # as in another process
    attend = partial(prior_attention, prior=pickle.loads(stored), sinks=torch.zeros(2))
    assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(x, x, x), expected)
