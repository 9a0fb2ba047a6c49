"""What can be stated beyond one score and one epsilon: numbers a problem, rounded marginals, points, masks."""

import math
import warnings

import ot
import pytest
import torch
from tolerances import assert_close
from torch.autograd import gradcheck
from transport_problems import FREE, INF, TWO_SIDED, UNBALANCED, random_problem

from eotattn.transport import Anderson, Auto, Sinkhorn, TransportProblem, pot, sinkhorn_divergence, solve
from eotattn.transport.certificates.duality_gap import refined
from eotattn.transport.optimality.residual import Residuals

DOUBLE = torch.float64


def column(*numbers):
    return torch.tensor(numbers, dtype=DOUBLE)[:, None]


def points(*sizes, seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, 2, generator=generator, dtype=DOUBLE).to(dtype) for size in sizes]


def masses(*sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(size, generator=generator, dtype=DOUBLE) + 0.1 for size in sizes]
    return [mass / mass.sum() for mass in drawn]


# Numbers a problem ----------------------------------------------------------------------------------------------------


def per_head(factored):
    """Two heads with their own epsilon and penalties, and the same heads one by one."""
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(2, size, 3, generator=generator, dtype=DOUBLE) for size in (5, 6))
    row, mass = masses(5, 6)
    numbers = {"epsilon": (0.4, 1.3), "query_penalty": (0.7, 5.0), "key_penalty": (2.0, 0.3)}

    def state(query, key, **options):
        options |= {"query_marginal": row, "key_marginal": mass}
        if factored:
            return TransportProblem.from_factors(query, key, **options)
        return TransportProblem(query @ key.mT, **options)

    together = state(query, key, **{name: column(*values) for name, values in numbers.items()})
    alone = [state(query[h], key[h], **{name: values[h] for name, values in numbers.items()}) for h in range(2)]
    return together, alone


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("solver", ["auto", "newton", "anderson", "sinkhorn"])
def test_heads_with_their_own_numbers_are_solved_as_if_alone(solver, factored):
    together, alone = per_head(factored)
    assert together.batch_shape == (2,)
    found, oracle = solve(together, solver).raise_if_not_converged(), pot.solve(together)
    assert_close(found.coupling, oracle.coupling, tolerance=1e-10)
    for head, one in enumerate(alone):
        expected = solve(one, solver)
        for name in ("coupling", "query_potential", "key_potential", "primal", "dual", "cost", "key_mass"):
            assert_close(getattr(found, name)[head], getattr(expected, name), tolerance=1e-10)
        assert_close(found.certificate.distance[head], expected.certificate.distance, tolerance=1e-11)


@pytest.mark.parametrize("factored", [False, True])
def test_numbers_have_gradients(factored):
    def outputs(epsilon, query_penalty, key_penalty):
        together, _ = per_head(factored)
        leaves = (*together.tensors, epsilon, query_penalty, key_penalty)
        solution = solve(together.with_leaves(*leaves), "newton")
        return solution.dual, solution.key_potential, solution.key_mass

    numbers = [column(0.4, 1.3), column(0.7, 5.0), column(2.0, 0.3)]
    gradcheck(outputs, [number.requires_grad_() for number in numbers])


# Marginals ------------------------------------------------------------------------------------------------------------


def test_marginals_rounded_to_float32_are_accepted_and_that_is_said():
    rounded = torch.full((7,), 1 / 7).double()
    assert abs(float(rounded.sum()) - 1) > 1e-9
    with pytest.warns(UserWarning, match="key_marginal sums to one within the rounding of float32 only"):
        problem = TransportProblem(torch.zeros(3, 7, dtype=DOUBLE), key_marginal=rounded)
    assert_close(solve(problem).key_mass, torch.full((7,), 1 / 7, dtype=DOUBLE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TransportProblem(torch.zeros(3, 7, dtype=DOUBLE), key_marginal=torch.full((7,), 1 / 7, dtype=DOUBLE))
    with pytest.raises(ValueError, match="sum to one under an infinite penalty"):
        TransportProblem(torch.zeros(3, 7, dtype=DOUBLE), key_marginal=rounded * (1 + 1e-4))


# Infeasible masks -----------------------------------------------------------------------------------------------------


def masked(seed, sizes=(5, 20)):
    """Random marginals and a sparse mask; whether a coupling exists is decided by linear programming."""
    from scipy.optimize import linprog

    generator = torch.Generator().manual_seed(seed)
    n, m = sizes
    allowed = torch.rand(n, m, generator=generator) < 0.25
    allowed[torch.randint(n, (m,), generator=generator), torch.arange(m)] = True
    allowed[:, 0] = True
    row, mass = masses(n, m, seed=seed)
    log_prior = torch.zeros(n, m, dtype=DOUBLE).masked_fill(~allowed, -INF)
    score = torch.randn(n, m, generator=generator, dtype=DOUBLE)
    problem = TransportProblem(score, log_prior=log_prior, query_marginal=row, key_marginal=mass)
    pairs = allowed.nonzero()
    equations = torch.zeros(n + m, len(pairs), dtype=DOUBLE)
    equations[pairs[:, 0], torch.arange(len(pairs))] = 1
    equations[n + pairs[:, 1], torch.arange(len(pairs))] = 1
    right = torch.cat([row, mass])
    answer = linprog([0.0] * len(pairs), A_eq=equations.numpy(), b_eq=right.numpy(), bounds=(0, None))
    return problem, answer.status == 0


@pytest.mark.parametrize("solver", ["auto", "anderson", "sinkhorn"])
def test_infeasible_masks_are_named_early(solver):
    verdicts = []
    for seed in range(30):
        problem, feasible = masked(seed)
        solution = solve(problem, Sinkhorn(tolerance=1e-6) if solver == "sinkhorn" else solver)
        verdicts.append(feasible)
        assert bool(solution.infeasible) == (not feasible)
        if not feasible:
            assert int(solution.num_iterations) <= 600
            assert "infeasible" in solution.status
            assert not solution.converged
            with pytest.raises(RuntimeError, match="1 of 1 infeasible"):
                solution.raise_if_not_converged()
    assert 5 <= sum(verdicts) <= 25, "the draw must hold both kinds"


def test_each_problem_of_a_batch_has_its_own_verdict():
    problems = [masked(seed) for seed in range(12)]
    stacked = [torch.stack(one) for one in zip(*(problem.tensors for problem, _ in problems), strict=True)]
    solution = solve(problems[0][0].with_tensors(*stacked))
    assert solution.infeasible.tolist() == [not feasible for _, feasible in problems]


# Rounding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalties", TWO_SIDED + UNBALANCED)
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_the_default_tolerance_is_the_floor_of_rounding(penalties, scale):
    for seed in range(5):
        problem = random_problem(seed, penalties, sizes=(12, 15), scale=scale, dtype=torch.float32)
        solution = solve(problem, "newton")
        residuals = Residuals(problem, problem.epsilon)
        floor = float(residuals.rounding(solution.key_potential, residuals(solution.key_potential))[1])
        # What no float32 potential can do better than: the exact one, rounded.
        wide = refined(problem)
        exact = solve(wide, "newton").key_potential.float().double()
        least = max(float(Residuals(wide, wide.epsilon)(exact).error), torch.finfo(torch.float32).eps)
        assert least <= floor
        assert solution.converged or floor > 1e-3 or not solution.coupling.isfinite().all()
        if solution.converged:
            assert float(solution.certificate.key_error) <= min(floor, 64 * least)


def test_a_batch_and_its_problems_alone_agree_to_the_floor():
    problem = random_problem(1, (INF, INF), sizes=(20, 20), scale=20.0, batch=(4,), dtype=torch.float32)
    together = solve(problem).raise_if_not_converged()
    for index in range(4):
        alone = solve(problem.with_tensors(*(tensor[index] for tensor in problem.tensors))).raise_if_not_converged()
        assert float((together.coupling[index] - alone.coupling).abs().sum()) <= 1e-3


# Points ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["key", "pairs", "mask"])
def test_points_with_a_log_prior(shape):
    x, y = points(6, 7)
    row, mass = masses(6, 7)
    generator = torch.Generator().manual_seed(2)
    log_prior = torch.randn(1 if shape != "pairs" else 6, 7, generator=generator, dtype=DOUBLE)
    if shape == "mask":
        log_prior[0, 3], mass = -INF, torch.where(torch.arange(7) == 3, 0.0, mass)
        mass = mass / mass.sum()
    options = {"epsilon": 0.1, "query_marginal": row, "key_marginal": mass, "key_penalty": 0.5, "query_penalty": 0.3}
    problem = TransportProblem.from_points(x, y, log_prior=log_prior, **options)
    assert problem.affinity.holds_pairs == (shape == "pairs")
    dense = TransportProblem(-torch.cdist(x, y).square(), log_prior=log_prior.expand(6, 7).contiguous(), **options)
    found, oracle = solve(problem), pot.solve(dense)
    assert_close(found.coupling, oracle.coupling, tolerance=1e-9)
    assert_close(found.primal, oracle.value, tolerance=1e-9)
    assert_close(problem.log_prior.expand(6, 7).nan_to_num(neginf=0.0), dense.log_prior.nan_to_num(neginf=0.0))


def test_half_precision_is_computed_in_float32():
    x, y = points(9, 9, dtype=torch.float16)
    uniform = torch.full((9,), 1 / 9)
    found = solve(TransportProblem.from_points(x, y, epsilon=0.1, key_marginal=uniform))
    expected = solve(TransportProblem.from_points(x.float(), y.float(), epsilon=0.1, key_marginal=uniform))
    assert torch.equal(found.coupling, expected.coupling)


@pytest.mark.parametrize("epsilon", [1e-2, 1e-3])
def test_factored_problems_reach_small_epsilon_by_default(epsilon):
    x, y = points(60, 60)
    uniform = torch.full((60,), 1 / 60, dtype=DOUBLE)
    problem = TransportProblem.from_points(x, y, epsilon=epsilon, key_marginal=uniform)
    solution = solve(problem, Auto(tolerance=1e-9)).raise_if_not_converged()
    assert_close(solution.coupling, solve(problem.dense(), "newton").coupling, tolerance=1e-8)


# Sinkhorn divergence --------------------------------------------------------------------------------------------------


def test_the_divergence_of_a_measure_from_itself_is_zero():
    (x,), (mass,) = points(8), masses(8)
    assert abs(float(sinkhorn_divergence(x, x, epsilon=0.3, x_mass=mass, y_mass=mass))) <= 1e-13
    assert abs(float(sinkhorn_divergence(x, x.flip(0), epsilon=0.3))) <= 1e-13


@pytest.mark.parametrize("zero", [False, True])
def test_the_divergence_equals_pot(zero):
    x, y = points(8, 11)
    row, mass = masses(8, 11)
    if zero:
        mass = torch.where(torch.arange(11) == 2, 0.0, mass)
        mass = mass / mass.sum()

    def transport(left, right, a, b):
        left, a, right, b = left[a > 0], a[a > 0], right[b > 0], b[b > 0]
        cost = torch.cdist(left, right).square()
        plan = ot.bregman.sinkhorn_log(a, b, cost, 0.2, numItermax=100_000, stopThr=1e-15)
        return (plan * cost).sum() + 0.2 * (plan * (plan / (a[:, None] * b)).log()).sum()

    expected = transport(x, y, row, mass) - (transport(x, x, row, row) + transport(y, y, mass, mass)) / 2
    assert_close(sinkhorn_divergence(x, y, epsilon=0.2, x_mass=row, y_mass=mass), expected, tolerance=1e-9)


def test_the_divergence_of_unequal_masses_is_positive_and_zero_on_itself():
    x, y = points(5, 6)
    row, mass = masses(5, 6)
    options = {"epsilon": 0.2, "penalty": 0.5}
    assert abs(float(sinkhorn_divergence(x, x, x_mass=2 * row, y_mass=2 * row, **options))) <= 1e-12
    assert float(sinkhorn_divergence(x, y, x_mass=2 * row, y_mass=mass, **options)) > 1e-3


def test_the_divergence_has_the_gradient_of_its_points():
    x, y = points(4, 5)
    gradcheck(lambda x, y: sinkhorn_divergence(x, y, epsilon=0.3), (x.requires_grad_(), y.requires_grad_()))


# New points -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalties", TWO_SIDED + UNBALANCED + FREE)
def test_potentials_at_the_old_points_are_the_potentials(penalties):
    x, y = points(6, 7)
    row, mass = masses(6, 7)
    options = {"epsilon": 0.1, "query_marginal": row, "query_penalty": penalties[0]}
    log_prior = None
    if penalties[1] is not None:
        options |= {"key_marginal": mass, "key_penalty": penalties[1]}
        log_prior = mass.log()[None]
    factored = TransportProblem.from_points(x, y, log_prior=log_prior, **options)
    solution = solve(factored)
    assert_close(solution.query_potential_at(x), solution.query_potential, tolerance=1e-11)
    if log_prior is not None:
        assert_close(solution.key_potential_at(y), solution.key_potential, tolerance=1e-11)
    dense = solve(TransportProblem(-torch.cdist(x, y).square(), **options))
    assert_close(dense.query_potential_at(dense.problem.score), dense.query_potential, tolerance=1e-11)


def test_a_new_point_has_the_potential_that_a_query_of_no_mass_would_have():
    x, y = points(6, 7)
    row, mass = masses(6, 7)
    wider = TransportProblem.from_points(
        torch.cat([x, y[:1]]),
        y,
        epsilon=0.1,
        query_marginal=torch.nn.functional.pad(row, (0, 1)),
        key_marginal=mass,
    )
    problem = TransportProblem.from_points(x, y, epsilon=0.1, query_marginal=row, key_marginal=mass)
    assert_close(solve(problem).query_potential_at(y[:1]), solve(wider).query_potential[-1:], tolerance=1e-10)


def test_a_place_is_asked_for():
    causal = TransportProblem.from_factors(torch.zeros(3, 2), torch.zeros(3, 2), epsilon=1.0, is_causal=True)
    with pytest.raises(NotImplementedError, match="potentials at new content need a problem without prior and order"):
        solve(causal).query_potential_at(torch.zeros(1, 2))


# Scaling form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("growth", [0.0, 0.4])
def test_the_scaling_form_is_the_exchange_in_logs_at_any_distance(growth, dtype):
    from eotattn.transport.problems.affinity import Affinity

    problem = random_problem(3, (INF, INF), sizes=(9, 8), masked=True, scale=2.0, epsilon=0.05)
    affinity = problem.affinity.with_tensors(*(tensor.to(dtype) for tensor in problem.affinity.tensors))
    log_marginal = problem.query_marginal.log().to(dtype)
    scaling = affinity.exchange(0.05, log_marginal, growth)
    exact = Affinity.exchange(problem.affinity, 0.05, problem.query_marginal.log(), growth)
    generator = torch.Generator().manual_seed(0)
    for size in (0.0, 1.0, 5.0, 0.5, 50.0, 0.1):
        potential = size * torch.randn(8, generator=generator, dtype=DOUBLE)
        for ours, theirs in zip(scaling(potential.to(dtype)), exact(potential.to(dtype).double()), strict=True):
            assert_close(ours, theirs.to(dtype), tolerance=1e-11 if dtype == DOUBLE else 1e-4)


def test_the_scaling_form_serves_keys_that_are_offered_next_to_nothing():
    score = torch.tensor([[0.0, -2000.0], [0.0, -3000.0]], dtype=DOUBLE)
    half = torch.full((2,), 0.5, dtype=DOUBLE)
    problem = TransportProblem(score, key_marginal=half)
    start = torch.zeros(2, dtype=DOUBLE)
    solution = solve(problem, Anderson(tolerance=1e-8), start=start).raise_if_not_converged()
    assert_close(solution.key_mass, half, tolerance=1e-8)
    assert math.isfinite(float(solution.key_potential.abs().max()))
