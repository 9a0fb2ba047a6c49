"""Gradients of values, potentials and couplings against finite differences, once and twice."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from transport_problems import INF, random_problem

from eotattn.transport import TransportProblem, solve

KINDS = [(INF, None), (1.5, None), (INF, INF), (INF, 0.7), (0.9, INF), (0.9, 0.7)]
VALUES = ("primal", "dual")
ARRAYS = ("coupling", "attention_weights", "query_potential", "key_potential")


def outputs(penalties, names, mask, epsilon=0.5):
    """A function of unconstrained tensors; softmax keeps the marginals on the simplex."""
    query_penalty, key_penalty = penalties

    def function(score, log_prior, query_logits, key_logits):
        problem = TransportProblem(
            score,
            epsilon=epsilon,
            log_prior=log_prior.masked_fill(mask, -INF),
            query_marginal=query_logits.softmax(-1),
            key_marginal=None if key_penalty is None else key_logits.softmax(-1),
            query_penalty=query_penalty,
            key_penalty=key_penalty,
        )
        solution = solve(problem)
        return tuple(getattr(solution, name) for name in names if (key_penalty is not None or name != "key_potential"))

    return function


def inputs(batch=()):
    generator = torch.Generator().manual_seed(0)
    shapes = (*batch, 3, 4), (3, 4), (*batch, 3), (4,)
    drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    drawn[2], drawn[3] = drawn[2] / 4, drawn[3] / 4
    return [tensor.requires_grad_() for tensor in drawn]


def mask(masked):
    forbidden = torch.zeros(3, 4, dtype=torch.bool)
    if masked:
        forbidden[0, 1] = forbidden[2, 3] = True
    return forbidden


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("penalties", KINDS)
def test_first_derivatives(penalties, masked):
    """Every entry of one problem's Jacobian; a batch of two, where entries of the others must vanish, at random."""
    function = outputs(penalties, VALUES + ARRAYS, mask(masked))
    gradcheck(function, inputs(), fast_mode=not masked)
    gradcheck(function, inputs((2,)), fast_mode=True)


@pytest.mark.parametrize("penalties", [(INF, INF), (0.9, 0.7)])
def test_second_derivatives(penalties):
    gradgradcheck(outputs(penalties, ("primal", "attention_weights"), mask(False)), inputs())


def test_small_epsilon_gradient_of_the_value_is_minus_the_coupling():
    problem = random_problem(0, (INF, INF), epsilon=1e-3)
    score = problem.score.clone().requires_grad_()
    solution = solve(problem.with_tensors(score, *problem.tensors[1:]))
    solution.primal.backward()
    torch.testing.assert_close(score.grad, -solution.coupling.detach(), rtol=0, atol=1e-10)


def test_backward_of_attention_is_an_advantage():
    # dLoss/dscore_ij = p_ij (u_ij - sum_k p_ik u_ik) / epsilon, Litman 2025.
    problem = random_problem(1)
    score = problem.score.clone().requires_grad_()
    reward = random_problem(2).score
    weights = solve(problem.with_tensors(score, *problem.tensors[1:])).attention_weights
    (weights * reward).sum().backward()
    p = weights.detach()
    expected = p * (reward - (p * reward).sum(-1, keepdim=True)) / problem.epsilon
    torch.testing.assert_close(score.grad, expected, rtol=0, atol=1e-12)


def test_reading_without_gradients_does_not_cut_later_gradients():
    problem = random_problem(1, (INF, INF))
    score = problem.score.clone().requires_grad_()
    solution = solve(problem.with_tensors(score, *problem.tensors[1:]))
    with torch.no_grad():
        repr(solution)
        assert not solution.coupling.requires_grad
    assert not solution.gap.requires_grad
    solution.coupling.square().sum().backward()
    assert score.grad.abs().max() > 1e-4


def test_keys_without_mass_receive_no_gradient_and_no_nan():
    problem = random_problem(4, (INF, INF), zeros=True)
    leaves = [tensor.clone().requires_grad_() for tensor in problem.tensors]
    solution = solve(problem.with_tensors(*leaves))
    (solution.coupling.square().sum() + solution.primal).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert leaves[3].grad[2] == 0
    assert (leaves[0].grad[:, 2] == 0).all()


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("penalties", KINDS)
def test_masses_of_masked_keys_and_empty_queries_have_the_gradients_of_the_coupling(penalties, factored):
    generator = torch.Generator().manual_seed(6)
    query, key, value = (torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (5, 6, 5))
    query, key = query.requires_grad_(), key.requires_grad_()
    logits = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    row = logits.masked_fill(torch.arange(5) == 1, -INF).softmax(-1)
    padding = torch.arange(6) == 2
    column = torch.rand(6, generator=generator, dtype=torch.float64).masked_fill(padding, 0.0)
    options = {"epsilon": 0.7, "query_marginal": row, "query_penalty": penalties[0]}
    if penalties[1] is not None:
        options |= {"key_marginal": column / column.sum(), "key_penalty": penalties[1]}
    if factored:
        problem = TransportProblem.from_factors(query, key, key_padding=padding, **options)
    else:
        mask = torch.zeros(5, 6, dtype=torch.float64).masked_fill(padding, -INF)
        problem = TransportProblem(query @ key.mT, log_prior=mask, **options)
    solution, leaves = solve(problem), (query, key, logits)
    found = (solution.key_mass.square().sum(), solution.apply_transpose(value).square().sum())
    expected = (solution.coupling.sum(-2).square().sum(), (solution.coupling.mT @ value).square().sum())
    for ours, theirs in zip(found, expected, strict=True):
        pairs = (torch.autograd.grad(one, leaves, retain_graph=True) for one in (ours, theirs))
        for left, right in zip(*pairs, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-9)
