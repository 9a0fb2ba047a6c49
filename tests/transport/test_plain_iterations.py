"""Plain iterations in scaling form: what they reach, how they are counted, and where they give way."""

import numpy as np
import ot
import pytest
import torch
from tolerances import assert_close
from transport_problems import INF, random_problem

from eotattn.transport import Anderson, Auto, Sinkhorn, solve


def by_hand(problem, count):
    """The marginal error after so many plain iterations from zero, in NumPy."""
    score, prior, query, key = (tensor.numpy() for tensor in problem.tensors)
    kernel, v = np.exp(score / problem.epsilon + prior), np.ones(score.shape[1])
    for _ in range(count):
        v = key / (kernel.T @ (query / (kernel @ v)))
    return np.abs(v * (kernel.T @ (query / (kernel @ v))) - key).sum()


@pytest.mark.parametrize("count", [1, 7, 10, 25])
def test_as_many_iterations_as_are_counted(count):
    problem = random_problem(0, (INF, INF), sizes=(6, 9), epsilon=0.3)
    solution = solve(problem, Sinkhorn(tolerance=1e-30, max_iterations=count))
    assert int(solution.num_iterations) == count
    assert abs(float(solution.marginal_error) - by_hand(problem, count)) <= 1e-14


def test_checks_come_every_ten_iterations_and_stop_each_problem_alone():
    batch = random_problem(1, (INF, INF), sizes=(6, 9), epsilon=0.15, batch=(8,))
    together = solve(batch, Sinkhorn(tolerance=1e-8)).raise_if_not_converged()
    assert len(together.num_iterations.unique()) > 1
    assert bool((together.num_iterations % 10 == 0).all())
    for position in range(8):
        alone = solve(batch.with_tensors(*(tensor[position] for tensor in batch.tensors)), Sinkhorn(tolerance=1e-8))
        assert int(alone.num_iterations) == int(together.num_iterations[position])
        assert_close(alone.key_potential, together.key_potential[position])


def test_keys_and_queries_without_mass_are_no_hindrance():
    problem = random_problem(2, (INF, INF), epsilon=0.3, zeros=True)
    solution = solve(problem).raise_if_not_converged()
    assert solution.solver == "Sinkhorn"
    assert int(solution.num_iterations) % 10 == 0
    assert float(solution.key_potential[2]) == -INF
    assert_close(solution.coupling, solve(problem, Anderson(tolerance=1e-13)).coupling, tolerance=1e-11)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.025])
def test_what_leaves_the_range_of_the_dtype_goes_on_otherwise(dtype, bound, epsilon):
    # Marginals over forty orders of magnitude: their potentials lie far from zero.
    problem = random_problem(3, (INF, INF), sizes=(7, 7), epsilon=epsilon, dtype=torch.float64)
    score, prior, query, _ = problem.tensors
    key = torch.logspace(0, -20 if dtype == torch.float32 else -200, 7, dtype=torch.float64)
    key = key / key.sum()
    problem = problem.with_tensors(*(one.to(dtype) for one in (score, prior, query, key)))
    solution = solve(problem).raise_if_not_converged()
    cost = -(score + epsilon * prior).numpy()
    plan = ot.sinkhorn(
        query.numpy(), key.numpy(), cost, epsilon, method="sinkhorn_log", stopThr=1e-13, numItermax=50000
    )
    assert float((solution.coupling.double() - torch.from_numpy(plan)).abs().sum()) <= bound


def test_auto_hands_on_what_plain_iterations_do_not_finish():
    problem = random_problem(4, (INF, INF), sizes=(30, 30), epsilon=0.02)
    solution = solve(problem, Auto(tolerance=1e-11)).raise_if_not_converged()
    assert solution.solver == "Sinkhorn, Newton"
    assert 100 < int(solution.num_iterations) <= 120
    assert solve(problem, Auto(tolerance=1e-11, max_iterations=40)).solver == "Sinkhorn"
