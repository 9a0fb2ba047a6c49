"""Transport keeps its precision under autocast: solving, reading, and differentiating."""

import math

import pytest
import torch
from tolerances import assert_close
from transport_problems import FREE, TWO_SIDED, UNBALANCED, random_problem

from eotattn.transport import SinkhornAttention, TransportProblem, certify, solve

INF = math.inf
READINGS = ("coupling", "attention_weights", "key_mass", "query_mass", "primal", "dual", "gap", "cost", "entropy")


def stated(kind, penalties):
    """A float32 problem whose tensors want gradients, and the tensors."""
    if kind == "dense":
        problem = random_problem(1, penalties, dtype=torch.float32, sizes=(30, 40))
        leaves = [None if x is None else x.clone().requires_grad_() for x in problem.tensors]
        return problem.with_tensors(*leaves), [x for x in leaves if x is not None]
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(size, 16, generator=generator).requires_grad_() for size in (30, 40))
    options = {} if penalties[1] is None else {"key_marginal": torch.full((40,), 1 / 40), "key_penalty": penalties[1]}
    problem = TransportProblem.from_factors(query, key, epsilon=2.0, query_penalty=penalties[0], **options)
    return problem, [query, key]


def readings(problem, leaves):
    solution = solve(problem)
    value = torch.linspace(-1, 1, 40)[:, None].expand(40, 3)
    found = {name: getattr(solution, name) for name in READINGS}
    found |= {"attend": solution.attend(value), "apply": solution.apply(value)}
    found["transposed"] = solution.apply_transpose(torch.linspace(-1, 1, 30)[:, None])
    found["distance"] = solution.certificate.distance
    total = sum(part.square().sum() for name, part in found.items() if name in ("coupling", "attend", "transposed"))
    gradients = torch.autograd.grad(total + solution.dual.sum(), leaves)
    return [*found.values(), *gradients]


@pytest.mark.parametrize("kind", ["dense", "factored"])
@pytest.mark.parametrize("penalties", [*TWO_SIDED, *UNBALANCED[:2], FREE[0]])
def test_autocast_changes_no_number(kind, penalties):
    expected = readings(*stated(kind, penalties))
    with torch.autocast("cpu", torch.bfloat16):
        found = readings(*stated(kind, penalties))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_second_derivatives_under_autocast():
    problem, leaves = stated("dense", (INF, 2.0))

    def curvature():
        (first,) = torch.autograd.grad(solve(problem).coupling.square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaves[0])[0]

    expected = curvature()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(curvature(), expected)


@pytest.mark.parametrize("key_penalty", [0.0, 1.0, INF])
def test_the_module_runs_and_trains(key_penalty):
    torch.manual_seed(0)
    module, tokens = SinkhornAttention(16, num_heads=2, key_penalty=key_penalty), torch.randn(2, 9, 16)
    expected = module(tokens)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = module(tokens)[0]
        output.square().sum().backward()
    assert_close(output.float(), expected, tolerance=5e-2)
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_certify_measures_what_it_is_given():
    score = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    expected = certify(score.softmax(-1), score).distance
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(certify(score.softmax(-1), score).distance, expected)
