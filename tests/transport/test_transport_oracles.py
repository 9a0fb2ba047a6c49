"""Solutions against oracles that share no code with the solvers: POT, SciPy, and the optimality conditions."""

import math
import subprocess
import sys
import warnings

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import minimize
from tolerances import assert_close, relative_error
from transport_problems import FREE, INF, SOLVERS, TWO_SIDED, UNBALANCED, random_problem

from eotattn.transport import TransportProblem, pot, solve


def wide_problem(seed, penalties):
    """Uneven sizes from one to fifteen, epsilon from 1e-3 to 10, scores to +-500, every other one masked."""
    generator = torch.Generator().manual_seed(1000 + seed)
    sizes = tuple(int(size) for size in torch.randint(1, 16, (2,), generator=generator))
    epsilon = 10 ** (4 * torch.rand(1, generator=generator).item() - 3)
    scale = (1.0, 30.0, 500.0)[seed % 3]
    return random_problem(seed, penalties, sizes=sizes, scale=scale, epsilon=epsilon, masked=seed % 2 == 1)


def free_keys_by(call, problem, iterations, **kinds):
    """The plan of free keys under a finite query penalty, by one of POT's solvers that work on the coupling itself."""
    score, prior, query, _ = (None if tensor is None else tensor.numpy() for tensor in problem.tensors)
    reference = query[:, None] * np.exp(prior)
    options = {"reg": problem.epsilon, "reg_m": (problem.query_penalty, 0.0), "c": reference, "G0": reference}
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # POT hands SciPy an option that SciPy is about to drop.
        warnings.filterwarnings("ignore", message=".*`disp` and `iprint`", category=DeprecationWarning)
        cost, ones = np.where(np.isfinite(prior), -score, 0.0), np.ones(score.shape[1])
        plan = call(query, ones, cost, numItermax=iterations, stopThr=1e-16, **options, **kinds)
    return torch.from_numpy(plan)


def test_closed_form_equals_pots_one_sided_call_on_100_problems():
    worst = 0.0
    for seed in range(100):
        problem = wide_problem(seed, (INF, None))
        solution, oracle = solve(problem), pot.solve(problem)
        assert oracle.call == "ot.unbalanced.sinkhorn_unbalanced"
        difference = (solution.coupling - oracle.coupling).abs()
        # Relative to each entry down to 1e-12 of the mass of its row.
        floor = 1e-12 * problem.query_marginal[:, None]
        worst = max(worst, float((difference / torch.maximum(oracle.coupling, floor)).max()))
        assert_close(solution.primal, oracle.value)
    assert worst <= 1e-12


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_closed_form_is_the_two_sided_optimum_at_its_own_key_marginal(seed, masked):
    problem = random_problem(seed, epsilon=0.2, masked=masked)
    coupling = solve(problem).coupling
    oracle, potential = pot.fixed_key_marginal(problem, coupling.sum(0))
    assert_close(coupling, oracle)
    assert float(potential.max() - potential.min()) <= 1e-10, "the idle constraint has a price"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_finite_query_penalty_equals_multiplicative_updates(seed, masked):
    problem = random_problem(seed, (0.7, None), epsilon=0.2, masked=masked)
    assert_close(solve(problem).coupling, free_keys_by(ot.unbalanced.mm_unbalanced, problem, 20_000, div="kl"))


def test_finite_query_penalty_equals_a_generic_optimiser():
    problem = random_problem(0, (0.7, None), epsilon=0.4)
    plan = free_keys_by(ot.unbalanced.lbfgsb_unbalanced, problem, 2_000, reg_div="kl", regm_div="kl")
    assert_close(solve(problem).coupling, plan, tolerance=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("epsilon", [1.0, 0.1])
@pytest.mark.parametrize("penalties", TWO_SIDED + UNBALANCED)
@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
def test_two_sided_and_unbalanced_equal_pot(method, penalties, epsilon, masked):
    for seed in range(2):
        problem = random_problem(seed, penalties, epsilon=epsilon, masked=masked, zeros=not masked)
        solution, oracle = solve(problem, solver=method).raise_if_not_converged(), pot.solve(problem)
        assert_close(solution.coupling, oracle.coupling, tolerance=1e-10)
        assert_close(solution.primal, oracle.value, tolerance=1e-10)


@pytest.mark.parametrize("penalties", [(0.7, None), (0.0, None)])
def test_soft_free_keys_equal_pot(penalties):
    problem = random_problem(3, penalties, batch=(2,))
    assert_close(solve(problem).coupling, pot.solve(problem).coupling)


def test_small_epsilon_two_sided_equals_pots_log_domain():
    problem = random_problem(4, (INF, INF), scale=5.0, epsilon=0.05)
    assert_close(solve(problem).coupling, pot.solve(problem).coupling, tolerance=1e-10)


@pytest.mark.parametrize("penalties", [(INF, INF), (1.0, 3.0), (INF, 2.0)])
def test_value_equals_scipys_maximum_of_the_written_out_dual(penalties):
    problem = random_problem(5, penalties)
    score, prior, query, key = (tensor.numpy() for tensor in problem.tensors)
    reference, n = query[:, None] * np.exp(prior), len(query)

    def gain(potential, marginal, penalty):
        return marginal @ (potential if math.isinf(penalty) else penalty * (1 - np.exp(-potential / penalty)))

    def loss(z):
        kernel = reference * (np.exp((score + z[:n, None] + z[None, n:]) / problem.epsilon) - 1)
        return problem.epsilon * kernel.sum() - gain(z[:n], query, penalties[0]) - gain(z[n:], key, penalties[1])

    found = minimize(loss, np.zeros(score.shape[0] + score.shape[1]), tol=1e-13, options={"maxiter": 5000})
    # Finite differences and a flat maximum leave SciPy at about 1e-9.
    assert abs(-found.fun - float(solve(problem).primal)) <= 1e-7


@pytest.mark.parametrize("scale", [1.0, 500.0])
@pytest.mark.parametrize("penalties", TWO_SIDED + UNBALANCED[:3])
@pytest.mark.parametrize("masked", [False, True])
def test_small_epsilon_satisfies_the_optimality_conditions(penalties, scale, masked):
    penalties = tuple(penalty * scale for penalty in penalties)
    for seed in range(2):
        problem = random_problem(seed, penalties, sizes=(8, 11), scale=scale, epsilon=1e-3 * scale, masked=masked)
        solution = solve(problem).raise_if_not_converged()
        coupling = solution.coupling
        assert coupling.isfinite().all()
        for side, marginal, penalty, potential in (
            (-1, problem.query_marginal, problem.query_penalty, solution.query_potential),
            (-2, problem.key_marginal, problem.key_penalty, solution.key_potential),
        ):
            target = marginal if math.isinf(penalty) else marginal * (-potential / penalty).exp()
            assert_close(coupling.sum(side), target, tolerance=1e-10)
        inner = (problem.score + solution.query_potential[:, None] + solution.key_potential) / problem.epsilon
        factorised = problem.query_marginal[:, None] * (inner + problem.log_prior).exp()
        assert_close(coupling, factorised, tolerance=1e-10)
        assert -1e-12 * scale <= float(solution.gap) <= 1e-10 * scale


@pytest.mark.parametrize("method", ["newton", "sinkhorn", "anderson"])
@pytest.mark.parametrize("penalties", [(INF, 1e4), (1e4, INF), (1e4, 3e3)])
def test_totals_that_differ_meet_at_once_under_high_penalties(penalties, method):
    # The constant that reconciles them is 1e4 temperatures long, and plain iterations walk there one by one.
    problem = random_problem(3, penalties)
    masses = (3.0 if penalties[0] < INF else 1.0, 0.2 if penalties[1] < INF else 1.0)
    *pairs, query, key = problem.tensors
    problem = problem.with_tensors(*pairs, masses[0] * query, masses[1] * key)
    solution = solve(problem, solver=SOLVERS[method](tolerance=1e-10, max_iterations=60)).raise_if_not_converged()
    coupling, potentials = solution.coupling, (solution.query_potential, solution.key_potential)
    marginals = (problem.query_marginal, problem.key_marginal)
    for side, potential, marginal, penalty in zip((-1, -2), potentials, marginals, penalties, strict=True):
        target = marginal if penalty == INF else marginal * (-potential / penalty).exp()
        assert_close(coupling.sum(side), target, tolerance=1e-10)
    inner = (problem.score + potentials[0][:, None] + potentials[1]) / problem.epsilon
    assert_close(coupling, problem.query_marginal[:, None] * (inner + problem.log_prior).exp(), tolerance=1e-9)


def test_pot_says_when_it_cannot():
    with pytest.raises(NotImplementedError, match=r"sinkhorn_unbalanced cannot hold TransportProblem"):
        pot.solve(random_problem(0, (1.0, 3.0), scale=500.0, epsilon=0.01))
    with pytest.raises(NotImplementedError, match=r"an infinite query_penalty"):
        pot.fixed_key_marginal(random_problem(0, (0.7, None)), torch.ones(7))
    with pytest.raises(RuntimeError, match=r"sinkhorn_log must converge"):
        pot.solve(random_problem(0, (INF, INF), epsilon=0.02), max_iterations=11)


def test_pots_trap_a_balanced_call_ignores_the_prior():
    # Why pot.solve folds the prior into the cost; if this fails, POT has mended it.
    problem = random_problem(0, (INF, INF))
    score, prior, query, key = (tensor.numpy() for tensor in problem.tensors)
    reference = query[:, None] * np.exp(prior)
    with_prior = ot.solve(-score, query, key, reg=problem.epsilon, c=reference, tol=1e-13, max_iter=5000).plan
    without = ot.solve(-score, query, key, reg=problem.epsilon, tol=1e-13, max_iter=5000).plan
    assert np.array_equal(with_prior, without)
    assert relative_error(torch.from_numpy(with_prior), solve(problem).coupling) > 1e-3


def test_pots_trap_an_underflowing_column_returns_the_starting_point():
    score = np.array([[0.0, 2.0], [0.0, 1.0]])
    half, options = np.array([0.5, 0.5]), {"unbalanced": (math.inf, 0.0), "unbalanced_type": "KL", "reg_type": "KL"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = ot.solve(score, half, half, reg=1e-3, c=np.full((2, 2), 0.25), **options).plan
    assert any("Numerical errors" in str(warning.message) for warning in caught)
    assert abs(plan.sum() - 1) > 0.1, "POT now survives underflow: keep_columns is no longer needed"
    problem = TransportProblem(torch.from_numpy(-score), epsilon=1e-3)
    assert_close(pot.solve(problem).coupling, solve(problem).coupling)


def test_pots_value_lacks_mass_terms():
    problem = random_problem(1, (1.0, 3.0))
    score, prior, query, key = (tensor.numpy() for tensor in problem.tensors)
    found = ot.solve(-score, query, key, reg=problem.epsilon, c=query[:, None] * np.exp(prior), unbalanced=(1.0, 3.0))
    assert abs(found.value - float(solve(problem).primal)) > 1e-2


@pytest.mark.parametrize("penalties", TWO_SIDED + UNBALANCED + FREE)
def test_pot_takes_batches(penalties):
    problem = random_problem(2, penalties, batch=(2,), epsilon=1.0)
    oracle = pot.solve(problem)
    assert oracle.coupling.shape == (2, 5, 7)
    assert_close(oracle.coupling, solve(problem).coupling, tolerance=1e-10)
    assert_close(oracle.value, solve(problem).primal, tolerance=1e-10)


def test_importing_transport_does_not_import_pot():
    code = "import sys, eotattn.transport; sys.exit('ot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
