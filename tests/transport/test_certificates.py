"""Certificates bound what they say they bound, for solutions and for any attention matrix."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_problems import FREE, INF, TWO_SIDED, UNBALANCED, random_problem

from eotattn.transport import Auto, Sinkhorn, TransportProblem, TransportSolution, certify, solve
from eotattn.transport.certificates.duality_gap import pinsker_radius
from eotattn.transport.optimality.objective import divergence


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("penalties", TWO_SIDED + UNBALANCED)
def test_distance_bounds_the_distance_of_unfinished_solutions(penalties, masked):
    problem = random_problem(1, penalties, masked=masked, epsilon=0.1)
    exact = solve(problem).coupling
    for tolerance in (1e-1, 1e-2, 1e-4):
        rough = solve(problem, solver=Sinkhorn(tolerance=tolerance))
        distance = float((rough.coupling - exact).abs().sum() / exact.sum())
        bound = float(rough.certificate.distance) * float(rough.coupling.sum() / exact.sum())
        assert distance <= 1.1 * bound + 1e-9
        # Far from a mask's support no feasible coupling is at hand, and the certificate says so.
        assert math.isfinite(bound) or (masked and tolerance > 1e-3)
    assert bound <= 1.0, "the bound says nothing"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    penalties=st.sampled_from(TWO_SIDED + UNBALANCED + FREE),
    noise=st.floats(1e-6, 3.0),
    mass=st.floats(0.01, 100.0),
)
def test_distance_bounds_the_distance_of_any_potentials(seed, penalties, noise, mass):
    problem = random_problem(seed, penalties, sizes=(3, 4))
    *pairs, query, key = problem.tensors
    query = query if penalties[0] == INF else mass * query
    problem = problem.with_tensors(*pairs, query, key)
    exact = solve(problem)
    generator = torch.Generator().manual_seed(seed)
    potentials = [
        potential + noise * torch.randn(potential.shape, generator=generator, dtype=torch.float64)
        for potential in (exact.query_potential, exact.key_potential)
    ]
    none = torch.zeros((), dtype=torch.int64)
    given_solution = TransportSolution(problem, *potentials, none, none > 0, "given")
    certificate = given_solution.certificate
    total = float(given_solution._gap.mass)
    assert float((given_solution.coupling - exact.coupling).abs().sum()) <= float(certificate.distance) * total + 1e-9
    assert float(certificate.dual) <= float(exact.primal) + 1e-9 * max(1.0, abs(float(exact.primal)))


@pytest.mark.parametrize("penalties", [(1e-8, 1e-8), (0.0, 1e-3)])
def test_masses_beyond_the_doubles_leave_no_bound_and_no_nan(penalties):
    solution = solve(random_problem(1, penalties, scale=500.0, epsilon=0.5))
    certificate = solution.certificate
    assert float(solution.coupling.sum()) == INF
    assert float(certificate.distance) == float(certificate.gap) == INF
    assert "nan" not in str(certificate)


@pytest.mark.parametrize("penalties", TWO_SIDED + UNBALANCED + FREE)
def test_primal_and_dual_enclose_the_optimum(penalties):
    problem = random_problem(2, penalties, epsilon=0.2)
    exact = solve(problem).primal
    options = {} if penalties[1] is None else {"solver": Sinkhorn(tolerance=1e-2)}
    certificate = solve(problem, **options).certificate
    assert certificate.dual <= exact + 1e-12
    assert certificate.primal >= exact - 1e-12
    assert certificate.gap == pytest.approx(float(certificate.primal - certificate.dual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalties", [(INF, None), (INF, INF), (8.0, 3.0)])
def test_values_are_those_of_float64_whatever_the_kernel(penalties, dtype):
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(200, 16, generator=generator).bfloat16() for _ in range(2))
    mass = torch.randint(1, 9, (2, 200), generator=generator)
    mass[:, 0] += 2048 - mass.sum(-1)  # sums of 2048ths are exact in every dtype

    def stated(kernel, own):
        options = {"epsilon": 4.0, "query_marginal": mass[0].to(own) / 2048, "query_penalty": penalties[0]}
        if penalties[1] is not None:
            options |= {"key_marginal": mass[1].to(own) / 2048, "key_penalty": penalties[1]}
        return TransportProblem.from_factors(query.to(kernel), key.to(kernel), **options)

    exact = solve(stated(torch.float64, torch.float64)).primal
    options = {} if penalties[1] is None else {"solver": Auto(tolerance=1e-4)}
    certificate = solve(stated(dtype, torch.float32), **options).certificate
    rounding = 1e-12 * exact.abs()
    assert certificate.dual <= exact + rounding
    assert certificate.primal >= exact - rounding
    assert float(certificate.gap) <= 1e-4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), first=st.floats(0.01, 5.0), second=st.floats(0.01, 5.0))
def test_pinsker_for_unequal_masses(seed, first, second):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.rand(7, generator=generator, dtype=torch.float64) ** 3 for _ in range(2))
    p, q = first * p, second * q + 1e-9
    gap = divergence(p, q.log()).sum()
    assert float((p - q).abs().sum()) <= float(pinsker_radius(gap, p.sum(), 1.0)) * (1 + 1e-12)


def attention(seed=0, sizes=(2, 9, 12)):
    generator = torch.Generator().manual_seed(seed)
    score, log_prior = (3 * torch.randn(*sizes, generator=generator, dtype=torch.float64) for _ in range(2))
    log_prior[..., -1] = -INF
    return score, log_prior


def test_exact_attention_has_no_gap():
    score, log_prior = attention()
    certificate = certify((score / 0.5 + log_prior).softmax(-1), score, log_prior, 0.5)
    assert float(certificate.gap.max()) <= 1e-14
    assert float(certificate.distance.max()) <= 1e-6
    problem = TransportProblem(score, epsilon=0.5, log_prior=log_prior)
    assert torch.allclose(certificate.dual, solve(problem).dual, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_attention_is_certified_within_its_bound(dtype):
    score, log_prior = attention(1)
    exact = (score + log_prior).softmax(-1)
    given_weights = exact.to(dtype)
    certificate = certify(given_weights, score, log_prior)
    distance = (given_weights.double() - exact).abs().sum(-1).mean(-1)
    assert (distance <= certificate.distance).all()
    assert float(certificate.distance.max()) <= 20 * torch.finfo(dtype).eps
    assert (certificate.query_error > 0).any()


@pytest.mark.parametrize("damage", ["swap", "scale", "negative", "forbidden", "empty"])
def test_no_error_is_hidden(damage):
    score, log_prior = attention(2)
    weights = (score + log_prior).softmax(-1)
    exact = weights.clone()
    if damage == "swap":
        weights[:, 0] = weights[:, 0].flip(-1)
    elif damage == "scale":
        weights[:, 0] *= 1.5
    elif damage == "negative":
        weights[:, 0, 0] -= 0.3
    elif damage == "forbidden":
        weights[:, 0, -1] = 1e-3
    else:
        weights[:, 0] = 0.0
    certificate = certify(weights, score, log_prior)
    assert (certificate.distance >= (weights - exact).abs().sum(-1).mean(-1)).all()
    if damage in ("forbidden", "empty"):
        assert (certificate.gap == INF).all()
        assert not certificate.converged.any()


def test_a_certificate_reads_as_a_table():
    text = str(solve(random_problem(3, (INF, 2.0), batch=(2,))).certificate)
    for word in ("primal", "dual", "gap", "error of key masses", "distance", "iterations", "2 of 2", "float64"):
        assert word in text


BAD = [
    (torch.ones(2, 3, dtype=torch.int64), TypeError, "weights must have a floating dtype"),
    (torch.full((2, 3), math.nan), ValueError, "weights must be finite"),
    (torch.zeros(3, 2), ValueError, r"weights must have shape \(2, 3\)"),
]


@pytest.mark.parametrize(("weights", "error", "message"), BAD)
def test_bad_weights_are_refused(weights, error, message):
    with pytest.raises(error, match=f"certify: {message}"):
        certify(weights, torch.zeros(2, 3))
