"""Certificates are sound to the last digit and tight: in extended precision, and in the dtype of what is returned."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transport_problems import FREE, INF, TWO_SIDED, UNBALANCED, random_problem

from eotattn.transport import TransportProblem, certify, solve


def extended_softmax(score, log_prior, epsilon):
    """Softmax in extended precision (64 bits of mantissa), the oracle."""
    logits = score.numpy().astype(np.longdouble) / np.longdouble(epsilon) + log_prior.numpy().astype(np.longdouble)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def distances(weights, exact):
    return torch.as_tensor(np.abs(weights.numpy().astype(np.longdouble) - exact).sum(-1).astype(np.float64))


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="needs an extended precision as the oracle")
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_ten_thousand_rows_are_bounded_whatever_their_error(scale):
    generator = torch.Generator().manual_seed(0)
    score, log_prior = (scale * torch.randn(10_000, 1, 13, generator=generator).double() for _ in range(2))
    log_prior[:, :, 5] = -INF
    exact = extended_softmax(score, log_prior, 0.7)
    found = (score / 0.7 + log_prior).softmax(-1)
    for size in (0.0, 1e-16, 1e-15, 1e-13, 5e-9, 1e-8, 1e-5, 1e-2):
        noise = size * torch.randn(found.shape, generator=generator, dtype=torch.float64)
        weights = found * noise.exp()
        certificate = certify(weights, score, log_prior, 0.7)
        true = distances(weights, exact)[..., 0]
        assert (true <= certificate.distance).all()
        assert (certificate.distance <= 1.001 * true + 2e-14 * max(1.0, scale)).all()


def test_an_exact_solution_has_no_distance():
    generator = torch.Generator().manual_seed(1)
    score = 3 * torch.randn(20, 30, 40, generator=generator, dtype=torch.float64)
    assert float(certify(score.softmax(-1), score).distance.max()) <= 1e-13
    assert float(solve(TransportProblem(score)).certificate.distance.max()) <= 1e-13


@pytest.mark.parametrize("penalties", TWO_SIDED + UNBALANCED + FREE)
def test_a_solution_to_the_last_digit_is_certified_as_one(penalties):
    solution = solve(random_problem(3, penalties, sizes=(12, 15), epsilon=0.3)).raise_if_not_converged()
    assert float(solution.certificate.distance) <= 1e-12


@pytest.mark.parametrize("shift", [5e-9, 1e-12])
@pytest.mark.parametrize("penalties", TWO_SIDED + UNBALANCED)
def test_a_small_error_of_a_solution_is_covered(penalties, shift):
    problem = random_problem(4, penalties, sizes=(6, 7))
    exact = solve(problem)
    weights = exact.coupling
    moved = torch.linspace(-shift, shift, 7, dtype=torch.float64)
    other = replace(exact, key_potential=exact.key_potential + moved)
    true = float((other.coupling - weights).abs().sum() / weights.sum())
    assert 0 < true <= float(other.certificate.distance) <= 1e3 * shift


def test_the_tensor_that_is_returned_is_what_is_certified():
    """In float32 the coupling of this problem underflows to nothing, though its potentials are fine."""
    score = torch.full((3, 4), -120.0)
    solution = solve(TransportProblem(score, query_penalty=0.0))
    assert float(solution.coupling.sum()) == 0.0
    assert float(solution.certificate.distance) >= 1.0


def test_mass_beyond_the_dtype_is_no_success():
    solution = solve(TransportProblem(torch.full((3, 4), 120.0), query_penalty=0.0))
    assert not solution.coupling.isfinite().all()
    assert not solution.converged
    assert float(solution.certificate.distance) == math.inf
    assert not solution.certificate.converged


@pytest.mark.parametrize("penalties", TWO_SIDED + UNBALANCED + FREE)
def test_float32_couplings_lie_within_their_distance(penalties):
    for seed in range(20):
        problem = random_problem(seed, penalties, dtype=torch.float32, scale=3.0)
        solution = solve(problem)
        wide = [None if x is None else x.double() for x in problem.tensors]
        for index, penalty in ((-2, penalties[0]), (-1, penalties[1])):
            if penalty == INF:
                wide[index] = wide[index] / wide[index].sum(-1, keepdim=True)
        exact = solve(problem.with_tensors(*wide)).coupling
        true = float((solution.coupling.double() - exact).abs().sum())
        assert true <= float(solution.certificate.distance) * float(exact.sum()) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("penalties", TWO_SIDED + UNBALANCED)
def test_keys_without_mass_change_no_value(penalties):
    problem = random_problem(5, penalties)
    expected = solve(problem)
    score, log_prior, query, key = problem.tensors
    pad = torch.nn.functional.pad
    wider = problem.with_tensors(pad(score, (0, 2)), pad(log_prior, (0, 2), value=3.0), query, pad(key, (0, 2)))
    found = solve(wider)
    for name in ("primal", "dual", "gap", "cost", "entropy"):
        assert float((getattr(found, name) - getattr(expected, name)).abs()) <= 1e-12
    assert float((found.certificate.primal - expected.certificate.primal).abs()) <= 1e-12
