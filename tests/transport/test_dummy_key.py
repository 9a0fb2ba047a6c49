"""A dummy key beside the others: attention with sinks, and partial transport, against POT and certificates."""

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linprog
from tolerances import assert_close

from eotattn.attention import AttentionSinks, prior_attention
from eotattn.priors import RecencyPrior
from eotattn.transport import certify, pot, solve, with_dummy_key

N, M, H, D = 5, 7, 2, 4


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["logits", "registers"])
def test_attention_with_sinks_solves_it(kind):
    query, key, prior = normal(1, H, N, D, seed=0), normal(1, H, M, D, seed=1), RecencyPrior(H)
    sinks = AttentionSinks.logit(H) if kind == "logits" else AttentionSinks.registers(H, D, 2)
    sinks = sinks.double()
    with torch.no_grad():
        for parameter in sinks.parameters():
            parameter.copy_(normal(*parameter.shape, seed=2))
        places = {"query_positions": range(N), "key_positions": range(M)}
        _, weights = prior_attention(query, key, key, prior=prior, sinks=sinks, return_weights=True, **places)
        logit = sinks().log_sum_exp(query, D**-0.5)[0].expand(H, N)
    log_prior = prior.dense(torch.arange(N), torch.arange(M), dtype=torch.float64).detach()
    for h in range(H):
        score = query[0, h] @ key[0, h].T
        problem = with_dummy_key(score, logit[h], log_prior=log_prior[h], epsilon=D**0.5)
        solution, oracle = solve(problem), pot.solve(problem)
        assert oracle.call == "ot.unbalanced.sinkhorn_unbalanced"
        assert_close(solution.attention_weights[:, :M], weights[0, h])
        assert_close(N * oracle.coupling[:, :M], weights[0, h])
        assert_close(pot.fixed_key_marginal(problem, solution.coupling.sum(0))[0], oracle.coupling)
        found = torch.cat([weights[0, h], 1 - weights[0, h].sum(-1, keepdim=True)], -1)
        assert float(certify(found, *problem.affinity.tensors, epsilon=D**0.5).gap) < 1e-12
        assert float(solution.certificate.gap) < 1e-12


def test_partial_transport_equals_pots_balanced_call_with_one_more_key():
    score, log_prior = normal(N, M, seed=3), 0.5 * normal(N, M, seed=4)
    marginal, kept, logit, epsilon = torch.full((M,), 0.7 / M, dtype=torch.float64), 0.3, normal(N, seed=5), 0.4
    options = {"log_prior": log_prior, "key_marginal": marginal, "untransported": kept, "epsilon": epsilon}
    solution = solve(with_dummy_key(score, logit, **options)).raise_if_not_converged()
    cost = torch.cat([-score - epsilon * log_prior, -epsilon * logit[:, None]], 1).numpy()
    target = torch.cat([marginal, torch.tensor([kept], dtype=torch.float64)]).numpy()
    expected = ot.sinkhorn(
        np.full(N, 1 / N), target, cost, epsilon, method="sinkhorn_log", stopThr=1e-14, numItermax=10**5
    )
    assert_close(solution.coupling, torch.tensor(expected), tolerance=1e-10)
    assert float(solution.certificate.gap) < 1e-9
    assert_close(solution.coupling[:, -1].sum(), torch.tensor(kept, dtype=torch.float64), tolerance=1e-9)


def test_at_low_temperature_it_is_the_linear_programme_of_partial_transport():
    """A share of the mass stays, chosen so that the rest travels at the least cost."""
    score, kept = normal(N, M, seed=6), 0.4
    marginal = torch.full((M,), 0.6 / M, dtype=torch.float64)
    options = {"key_marginal": marginal, "untransported": kept, "epsilon": 2e-3}
    solution = solve(with_dummy_key(score, 0.0, **options)).raise_if_not_converged()
    rows = np.kron(np.eye(N), np.ones(M))
    columns = np.kron(np.ones(N), np.eye(M))
    expected = linprog(-score.numpy().ravel(), A_ub=rows, b_ub=np.full(N, 1 / N), A_eq=columns, b_eq=marginal.numpy())
    travelled = float((score * solution.coupling[:, :M]).sum())
    assert abs(travelled + expected.fun) < 2e-3 * np.log(N * (M + 1)) + 1e-6


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"logit": torch.zeros(N + 1)}, ValueError, "with_dummy_key: logit must be a number, or end in 1 or 5 numbers"),
        ({"logit": float("nan")}, ValueError, "with_dummy_key: logit must be finite"),
        ({"untransported": 0.3}, ValueError, "untransported must be given with key_marginal"),
        ({"key_marginal": torch.full((M,), 1 / M)}, ValueError, "untransported must be given with key_marginal"),
        (
            {"key_marginal": torch.full((M,), 1 / M), "untransported": 1.5},
            ValueError,
            r"untransported must lie in \(0, 1\)",
        ),
        (
            {"key_marginal": torch.full((M,), 1 / M), "untransported": 0.5},
            ValueError,
            "with_dummy_key: key_marginal must sum to 1 - untransported, 0.5",
        ),
        ({"log_prior": torch.zeros(N, M + 1)}, ValueError, "with_dummy_key: log_prior must"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        with_dummy_key(torch.zeros(N, M), **{"logit": 0.0, **arguments})
