"""A GPU solves what a CPU solves: in every precision, recorded or step by step, with every kind of constraint."""

import math

import pytest
import torch
from tolerances import assert_close
from transport_problems import SOLVERS

from eotattn.priors import goat_prior
from eotattn.transport import Auto, TransportProblem, solve
from eotattn.transport.solvers import iteration

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PENALTIES = [(math.inf, math.inf), (2.0, math.inf), (1.0, 3.0)]


def stated(penalties, dtype, device):
    """A problem with a prior, padding, uneven marginals and a key without mass; the same numbers for every dtype."""
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(2, 3, 150, 24, generator=generator).bfloat16() for _ in range(2))
    masses = [torch.rand(2, 3, 150, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2)]
    own = torch.float64 if dtype == torch.float64 else torch.float32
    padding = torch.zeros(2, 1, 150, dtype=torch.bool)
    padding[0, :, 140:] = True
    masses[1][0, :, 140:] = 0.0
    masses[1][:, :, 5] = 0.0
    rows, columns = ((mass / mass.sum(-1, keepdim=True)).to(device, own) for mass in masses)
    prior = goat_prior(3, num_frequencies=2).requires_grad_(False)
    return TransportProblem.from_factors(
        query.to(device, dtype),
        key.to(device, dtype),
        epsilon=math.sqrt(24),
        prior=prior.to(device),
        key_padding=padding.to(device),
        query_marginal=rows,
        key_marginal=columns,
        query_penalty=penalties[0],
        key_penalty=penalties[1],
    )


@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "bound"),
    [(torch.float64, 1e-11, 1e-9), (torch.float32, 5e-6, 2e-5), (torch.bfloat16, 1e-5, 1e-3)],
)
def test_masses_are_those_of_the_cpu(penalties, dtype, tolerance, bound):
    expected = solve(stated(penalties, torch.float64, "cpu"), solver=Auto(tolerance=1e-11))
    found = solve(
        stated(penalties, dtype, "cuda"), solver=Auto(tolerance=tolerance, max_iterations=100)
    ).raise_if_not_converged()
    for name in ("key_mass", "query_mass"):
        assert_close(getattr(found, name).double().cpu(), getattr(expected, name), tolerance=bound)
    assert float(found.certificate.distance.max()) <= max(100 * bound, 1e-6)


def step_by_step(advance, running, *, hands_on):
    advance()
    while bool(running):
        advance()


@pytest.mark.parametrize("method", ["anderson", "sinkhorn"])
@pytest.mark.parametrize("penalties", PENALTIES)
def test_recorded_iterations_are_the_same_iterations(penalties, method, monkeypatch):
    problem = stated(penalties, torch.float32, "cuda")
    found = solve(problem, solver=SOLVERS[method](tolerance=1e-30, max_iterations=12))
    monkeypatch.setattr(iteration, "repeat_while", step_by_step)
    expected = solve(problem, solver=SOLVERS[method](tolerance=1e-30, max_iterations=12))
    assert int(found.num_iterations.min()) == int(expected.num_iterations.max()) == 12
    assert_close(found.key_potential.nan_to_num(neginf=0.0), expected.key_potential.nan_to_num(neginf=0.0))


def test_each_problem_of_a_batch_stops_by_itself():
    problem = stated((math.inf, math.inf), torch.float32, "cuda")
    solver = Auto(tolerance=1e-5, max_iterations=100)
    together = solve(problem, solver)
    on_the_cpu = solve(
        stated((math.inf, math.inf), torch.float32, "cpu"), solver=Auto(tolerance=1e-5, max_iterations=100)
    )
    assert bool(together.converged.all())
    assert int((together.num_iterations.cpu() - on_the_cpu.num_iterations).abs().max()) <= 2


@pytest.mark.parametrize("method", ["anderson", "sinkhorn"])
def test_memory_of_pairs_is_given_back(method):
    problem = stated((math.inf, math.inf), torch.float32, "cuda").dense()
    pairs = problem.score.numel() * problem.score.element_size()
    solve(problem, solver=SOLVERS[method](tolerance=1e-30, max_iterations=12))
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    score = problem.score.repeat(1, 1, 8, 8)
    masses = [mass.repeat(1, 1, 8) / 8 for mass in (problem.query_marginal, problem.key_marginal)]
    larger = TransportProblem(score, epsilon=problem.epsilon, query_marginal=masses[0], key_marginal=masses[1])
    solve(larger, solver=SOLVERS[method](tolerance=1e-30, max_iterations=12))
    del larger, score
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - held < 64 * pairs


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("method", ["anderson", "sinkhorn"])
def test_a_device_that_is_not_the_current_one(method):
    assert torch.cuda.current_device() == 0
    solver = SOLVERS[method](tolerance=1e-30, max_iterations=12)
    expected, found = (
        solve(stated((math.inf, math.inf), torch.float32, device), solver) for device in ("cuda:0", "cuda:1")
    )
    assert int(found.num_iterations.min()) == 12
    assert_close(found.key_mass.cpu(), expected.key_mass.cpu(), tolerance=1e-5)
