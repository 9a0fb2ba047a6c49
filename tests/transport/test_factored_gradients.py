"""Gradients through fused calls: against finite differences, and against dense automatic differentiation."""

import pytest
import torch
from tolerances import assert_close
from torch.autograd import gradcheck
from transport_problems import INF

from eotattn.priors import FourierPrior, RecencyPrior, SinkPrior
from eotattn.transport import TransportProblem, solve

KINDS = [(INF, None), (0.8, None), (INF, INF), (INF, 2.0), (0.9, 0.7)]


def leaves():
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 2), (4, 2), (4, 2), (3,), (4,)
    return [0.7 * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def statement(penalties, query_logits, key_logits):
    options = {"epsilon": 0.6, "query_marginal": query_logits.softmax(-1), "query_penalty": penalties[0]}
    if penalties[1] is not None:
        options |= {"key_marginal": key_logits.softmax(-1), "key_penalty": penalties[1]}
    return options


def outputs(solution, value):
    return solution.apply(value), solution.attend(value), solution.apply_transpose(value[:3]), solution.dual


@pytest.mark.parametrize("penalties", KINDS)
def test_finite_differences(penalties):
    def function(query, key, value, *logits):
        problem = TransportProblem.from_factors(query, key, **statement(penalties, *logits))
        return outputs(solve(problem), value)

    gradcheck(function, [leaf.requires_grad_() for leaf in leaves()], atol=1e-6)


@pytest.mark.parametrize("penalties", KINDS)
def test_equal_to_unrolled_iterations(penalties):
    """Automatic differentiation through three hundred plain iterations, which shares nothing with the implicit one."""
    query, key, value, *logits = (leaf.requires_grad_() for leaf in leaves())
    options = statement(penalties, *logits)
    epsilon, a, b = 0.6, options["query_marginal"], options.get("key_marginal")
    shares = [1.0 if rho == INF else rho / (rho + epsilon) for rho in (penalties[0], penalties[1] or 0.0)]
    score, g = query @ key.mT, torch.zeros(4, dtype=torch.float64)
    for _ in range(300 if b is not None else 1):
        f = -shares[0] * epsilon * ((score + g) / epsilon).logsumexp(1)
        if b is not None:
            offered = epsilon * ((score + f[:, None]) / epsilon + a.log()[:, None]).logsumexp(0)
            g = shares[1] * (epsilon * b.log() - offered)
    f = -shares[0] * epsilon * ((score + g) / epsilon).logsumexp(1)
    coupling = a[:, None] * ((score + f[:, None] + g) / epsilon).exp()
    expected = torch.autograd.grad((coupling @ value).sin().sum(), (query, key, value), retain_graph=True)
    solution = solve(TransportProblem.from_factors(query, key, **options))
    found = torch.autograd.grad(solution.apply(value).sin().sum(), (query, key, value), retain_graph=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, tolerance=1e-9)


@pytest.mark.parametrize("penalties", KINDS)
def test_parameters_of_the_prior(penalties):
    prior = RecencyPrior(2) + SinkPrior(2) + FourierPrior(2, num_frequencies=2)
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(2, size, 3, generator=generator, dtype=torch.float64) for size in (5, 6))
    key_marginal = None if penalties[1] is None else torch.full((6,), 1 / 6, dtype=torch.float64)
    options = {"epsilon": 0.6, "query_penalty": penalties[0], "key_marginal": key_marginal}
    options |= {"key_penalty": penalties[1]} if key_marginal is not None else {}
    weight = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    factored = TransportProblem.from_factors(query, key, prior=prior, **options)
    table = prior.dense(torch.arange(5), torch.arange(6), dtype=torch.float64)
    dense = TransportProblem(query @ key.mT, log_prior=table, **options)
    gradients = [
        torch.autograd.grad((solve(problem).coupling * weight).sum(), list(prior.parameters()), allow_unused=True)
        for problem in (factored, dense)
    ]
    largest = 0.0
    for ours, theirs in zip(*gradients, strict=True):
        if theirs is not None:
            assert_close(ours, theirs, tolerance=1e-7)  # the parameters are float32
            largest = max(largest, float(theirs.abs().max()))
    assert largest > 1e-3


def test_second_derivatives_are_refused():
    query, key, value, *_ = (leaf.requires_grad_() for leaf in leaves())
    solution = solve(TransportProblem.from_factors(query, key, epsilon=0.6))
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(solution.apply(value).sum(), query, create_graph=True)
