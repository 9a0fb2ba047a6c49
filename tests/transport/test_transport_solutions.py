"""What every solution satisfies: certificates, invariances, limits, statuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from transport_problems import FREE, INF, SOLVERS, TWO_SIDED, UNBALANCED, random_problem

from eotattn.transport import Auto, Sinkhorn, TransportProblem, TransportSolution, solve
from eotattn.transport.optimality.objective import primal_objective

ITERATIVE = TWO_SIDED + UNBALANCED
ALL = ITERATIVE + FREE


def with_potentials(problem, query_potential, key_potential):
    none = torch.zeros(problem.batch_shape, dtype=torch.int64)
    return TransportSolution(problem, query_potential, key_potential, none, none > 0, "given")


def index(problem, position):
    """One problem of a batch, stated anew."""
    names = ("log_prior", "query_marginal", "key_marginal")
    rest = {name: getattr(problem, name)[position] for name in names if getattr(problem, name) is not None}
    key_penalty = None if problem.key_marginal is None else problem.key_penalty
    return TransportProblem(
        problem.score[position],
        epsilon=problem.epsilon,
        query_penalty=problem.query_penalty,
        key_penalty=key_penalty,
        **rest,
    )


@pytest.mark.parametrize("epsilon", [1.0, 0.02])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("penalties", ALL)
def test_gap_closes_and_is_never_negative(penalties, masked, epsilon):
    for seed in range(3):
        solution = solve(random_problem(seed, penalties, masked=masked, epsilon=epsilon)).raise_if_not_converged()
        magnitude = max(1.0, float(solution.primal.abs()))
        assert -1e-13 * magnitude <= float(solution.gap) <= 1e-10 * magnitude
        assert_close(solution.primal, solution.dual, tolerance=1e-10)


@pytest.mark.parametrize("penalties", ITERATIVE)
@pytest.mark.parametrize("masked", [False, True])
def test_gap_bounds_the_error_of_an_unfinished_solution(penalties, masked):
    problem = random_problem(1, penalties, masked=masked, epsilon=0.1)
    exact = solve(problem)
    rough = solve(problem, solver=Sinkhorn(tolerance=1e-3))
    gap = float(rough.gap)
    assert -1e-13 <= gap < math.inf
    assert gap >= float(exact.dual - rough.dual) - 1e-13
    assert gap >= float(rough.primal - exact.primal) - 1e-13
    assert float(rough.primal) >= float(exact.primal) - 1e-13


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    penalties=st.sampled_from(ALL),
    masked=st.booleans(),
    scale=st.floats(0.01, 3.0),
)
def test_weak_duality_for_any_potentials(seed, penalties, masked, scale):
    problem = random_problem(seed, penalties, sizes=(3, 4), masked=masked)
    generator = torch.Generator().manual_seed(seed)
    query, key = (scale * torch.randn(size, generator=generator, dtype=torch.float64) for size in (3, 4))
    arbitrary = with_potentials(problem, query, key)
    optimum = solve(problem)
    slack = 1e-12 * max(1.0, abs(float(optimum.primal)))
    assert float(arbitrary.dual) <= float(optimum.primal) + slack
    assert float(arbitrary.gap) >= -slack
    assert float(arbitrary.primal) >= float(optimum.dual) - slack


def test_primal_is_the_objective_as_written():
    problem = random_problem(7, (1.0, 3.0))
    coupling = solve(problem).coupling

    def divergence(p, q):
        return (p * (p / q).log() - p + q).sum()

    reference = problem.query_marginal[:, None] * problem.log_prior.exp()
    expected = (
        -(coupling * problem.score).sum()
        + problem.epsilon * divergence(coupling, reference)
        + 1.0 * divergence(coupling.sum(1), problem.query_marginal)
        + 3.0 * divergence(coupling.sum(0), problem.key_marginal)
    )
    assert_close(solve(problem).primal, expected)
    assert_close(primal_objective(problem, coupling), expected)


def test_value_of_attention_is_the_mean_query_potential():
    problem = random_problem(8)
    normalised = TransportProblem(problem.score, epsilon=0.5, log_prior=problem.log_prior.log_softmax(-1))
    solution = solve(normalised)
    assert_close(solution.primal, solution.query_potential.mean())
    expected = (normalised.score / 0.5 + normalised.log_prior).softmax(-1)
    assert_close(solution.attention_weights, expected)
    assert_close(solution.coupling, expected / 5)


def test_optimal_coupling_beats_feasible_neighbours():
    problem = random_problem(9, (INF, INF))
    coupling = solve(problem).coupling
    cycle = torch.zeros_like(coupling)
    cycle[0, 0] = cycle[1, 1] = 1e-4
    cycle[0, 1] = cycle[1, 0] = -1e-4
    best = primal_objective(problem, coupling)
    assert primal_objective(problem, coupling + cycle) > best
    assert primal_objective(problem, coupling - cycle) > best


@pytest.mark.parametrize("penalties", ALL)
@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
def test_batch_equals_loop(penalties, method):
    method = method if penalties[1] is not None else "closed_form"
    problem = random_problem(3, penalties, batch=(2, 3))
    together = solve(problem, solver=method)
    assert together.gap.shape == together.num_iterations.shape == together.converged.shape == (2, 3)
    for position in [(0, 0), (1, 2)]:
        alone = solve(index(problem, position), solver=method)
        assert alone.primal.shape == alone.gap.shape == alone.marginal_error.shape == ()
        for name in ("coupling", "attention_weights", "query_potential", "key_potential", "primal", "dual"):
            assert_close(getattr(together, name)[position], getattr(alone, name), tolerance=1e-11)


def test_leading_dimensions_broadcast():
    base = random_problem(4, (INF, 2.0), batch=(3,))
    problem = TransportProblem(
        base.score[0], log_prior=base.log_prior[:, None], key_marginal=base.key_marginal[:2], key_penalty=2.0
    )
    solution = solve(problem)
    assert problem.batch_shape == (3, 2)
    assert solution.coupling.shape == (3, 2, 5, 7)
    one = TransportProblem(
        base.score[0], log_prior=base.log_prior[2], key_marginal=base.key_marginal[1], key_penalty=2.0
    )
    assert_close(solution.coupling[2, 1], solve(one).coupling, tolerance=1e-11)
    assert_close(solution.primal[2, 1], solve(one).primal, tolerance=1e-11)


def test_problems_of_a_batch_stop_on_their_own():
    easy, hard = torch.zeros(5, 7).double(), random_problem(1).score * 20
    problem = TransportProblem(torch.stack([easy, hard]), key_marginal=torch.full((7,), 1 / 7, dtype=torch.float64))
    solution = solve(problem, solver=Sinkhorn(max_iterations=3))
    assert solution.converged.tolist() == [True, False]
    assert solution.num_iterations.tolist() == [0, 3]


def test_a_converged_problem_is_left_where_it_would_have_stopped_alone():
    easy, hard = random_problem(1, (INF, INF), epsilon=0.5), random_problem(2, (INF, INF), epsilon=0.5)
    stacked = [
        torch.stack([4 * b if i == 0 else b, a])
        for i, (a, b) in enumerate(zip(easy.tensors, hard.tensors, strict=True))
    ]
    options = {"solver": Sinkhorn(tolerance=1e-3)}
    together, alone = solve(easy.with_tensors(*stacked), **options), solve(easy, **options)
    assert together.num_iterations[0] > together.num_iterations[1] == alone.num_iterations
    assert_close(together.coupling[1], alone.coupling)


@pytest.mark.parametrize("penalties", [(INF, None), (INF, INF), (INF, 2.0)])
def test_row_constants_change_nothing_under_a_hard_query_marginal(penalties):
    problem = random_problem(5, penalties)
    constant = torch.linspace(-3, 4, 5).double()[:, None]
    score, log_prior, *marginals = problem.tensors
    for moved in (problem.with_tensors(score + constant, log_prior, *marginals),
                  problem.with_tensors(score, log_prior + constant, *marginals)):  # fmt: skip
        assert_close(solve(moved).attention_weights, solve(problem).attention_weights)


def test_row_constants_do_matter_under_a_soft_query_marginal():
    problem = random_problem(5, (1.0, None))
    score, *rest = problem.tensors
    moved = problem.with_tensors(score + torch.linspace(-3, 4, 5).double()[:, None], *rest)
    assert (solve(moved).coupling - solve(problem).coupling).abs().max() > 1e-2
    assert_close(solve(moved).attention_weights, solve(problem).attention_weights)


@pytest.mark.parametrize("penalties", ALL)
def test_permutation_equivariance(penalties):
    problem = random_problem(6, penalties)
    rows, columns = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([6, 2, 0, 5, 1, 4, 3])
    score, log_prior, query, key = problem.tensors
    moved = problem.with_tensors(
        score[rows][:, columns], log_prior[rows][:, columns], query[rows], None if key is None else key[columns]
    )
    assert_close(solve(moved).coupling, solve(problem).coupling[rows][:, columns], tolerance=1e-11)


@pytest.mark.parametrize("limit", ["two-sided", "one-sided", "soft queries"])
def test_penalties_interpolate(limit):
    def at(penalties):
        return solve(random_problem(2, penalties)).coupling

    far, near, target = {
        "two-sided": ((INF, 1e2), (INF, 1e6), (INF, INF)),
        "one-sided": ((INF, 1e-1), (INF, 1e-7), (INF, None)),
        "soft queries": ((1e2, 2.0), (1e6, 2.0), (INF, 2.0)),
    }[limit]
    assert_close(at(near), at(target), tolerance=1e-5)
    assert (at(far) - at(target)).abs().max() > 10 * (at(near) - at(target)).abs().max()


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("stated", ["dense", "factored"])
def test_numbers_changed_in_place_are_solved_as_they_are(stated, follows):
    """Tolerance and warmer temperatures follow the size of the scores, which an earlier solve has seen smaller."""
    generator = torch.Generator().manual_seed(0)
    content, key = (torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    uniform = torch.full((8,), 1 / 8, dtype=torch.float64)

    def state(tensor):
        if stated == "dense":
            return TransportProblem(tensor, key_marginal=uniform)
        return TransportProblem.from_factors(tensor, key, epsilon=1.0, key_marginal=uniform)

    size = 3000 if stated == "dense" else 30
    tensor = (1e-3 * content).requires_grad_(follows)
    problem = state(tensor)
    solve(problem, solver="newton")
    with torch.no_grad():
        tensor.copy_(size * content)
    found = solve(problem, solver="newton")
    expected = solve(state(tensor.detach().clone()), solver="newton")
    assert bool(found.converged)
    assert int(found.num_iterations) == int(expected.num_iterations)
    assert_close(found.coupling, expected.coupling)


def test_gauge_of_balanced_problems():
    solution = solve(random_problem(3, (INF, INF), batch=(2,)))
    assert_close((solution.problem.key_marginal * solution.key_potential).sum(-1), torch.zeros(2).double())


@pytest.mark.parametrize("penalties", ITERATIVE)
def test_entries_without_mass(penalties):
    solution = solve(random_problem(4, penalties, zeros=True)).raise_if_not_converged()
    assert (solution.coupling[1] == 0).all()
    assert (solution.coupling[:, 2] == 0).all()
    assert solution.key_potential[2] == -INF
    assert_close(solution.attention_weights.sum(-1), torch.ones(5).double())
    assert abs(float(solution.gap)) <= 1e-12


def test_soft_keys_out_of_reach_lose_their_mass():
    problem = random_problem(4, (INF, 2.0))
    log_prior = problem.log_prior.clone()
    log_prior[:, 3] = -INF
    solution = solve(problem.with_tensors(problem.score, log_prior, *problem.tensors[2:]))
    assert solution.key_potential[3] == INF
    assert (solution.coupling[:, 3] == 0).all()
    assert abs(float(solution.gap)) <= 1e-12


def test_one_query_and_one_key():
    for penalties in ALL:
        solution = solve(random_problem(0, penalties, sizes=(1, 1)))
        assert_close(solution.attention_weights, torch.ones(1, 1).double())
        assert abs(float(solution.gap)) <= 1e-12


def test_a_mask_with_a_single_doubly_stochastic_coupling():
    # Causal and balanced: only the identity remains, and the potentials run off; the coupling still converges.
    causal = torch.zeros(5, 5).double().masked_fill(torch.ones(5, 5).triu(1).bool(), -INF)
    problem = TransportProblem(
        random_problem(0, sizes=(5, 5)).score, log_prior=causal, key_marginal=torch.full((5,), 0.2, dtype=torch.float64)
    )
    assert_close(solve(problem).raise_if_not_converged().coupling, 0.2 * torch.eye(5).double(), tolerance=1e-10)


def test_a_mask_without_any_coupling_is_a_status():
    log_prior = torch.tensor([[0.0, -INF], [0.0, 0.0]]).double()
    half = torch.tensor([0.5, 0.5]).double()
    key_marginal = torch.tensor([0.25, 0.75]).double()
    problem = TransportProblem(
        torch.zeros(2, 2).double(), log_prior=log_prior, query_marginal=half, key_marginal=key_marginal
    )
    solution = solve(problem, solver=Auto(max_iterations=20))
    assert not solution.converged
    assert solution.coupling.isfinite().all()
    assert solution.gap == INF


def test_failure_to_converge_is_a_status_and_raises_on_request():
    problem = random_problem(1, (INF, INF), epsilon=0.02)
    solution = solve(problem, solver=Sinkhorn(max_iterations=2))
    assert not solution.converged
    assert solution.num_iterations == 2
    assert float(solution.marginal_error) > 1e-6
    assert solution.coupling.isfinite().all()
    with pytest.raises(RuntimeError, match=r"converged must be true .* not converged by Sinkhorn after 2 iterations"):
        solution.raise_if_not_converged()
    assert solve(problem).raise_if_not_converged().converged


@pytest.mark.parametrize("method", ["newton", "sinkhorn", "anderson"])
@pytest.mark.parametrize("epsilon", [0.5, 1e-3])
def test_logits_beyond_the_digits_of_float32_are_no_convergence(epsilon, method):
    problem = random_problem(1, (INF, INF), scale=500.0, epsilon=epsilon, dtype=torch.float32)
    solution = solve(problem, solver=SOLVERS[method](max_iterations=100))
    assert not solution.converged or float(solution.certificate.key_error) <= 2e-3


def test_tolerance_means_the_marginal_error():
    problem = random_problem(1, (INF, INF), epsilon=0.2)
    loose, tight = (solve(problem, solver=Sinkhorn(tolerance=tolerance)) for tolerance in (1e-2, 1e-6))
    assert 1e-6 < float(loose.marginal_error) <= 1e-2
    assert float(tight.marginal_error) <= 1e-6
    assert loose.num_iterations < tight.num_iterations
    violation = (loose.coupling.sum(0) - problem.key_marginal).abs().sum()
    assert_close(loose.marginal_error, violation)
    assert_close(loose.coupling.sum(1), problem.query_marginal)


@pytest.mark.parametrize("penalties", ALL)
def test_float32(penalties):
    problem = random_problem(2, penalties, dtype=torch.float32, epsilon=0.2)
    solution = solve(problem).raise_if_not_converged()
    assert solution.coupling.dtype == solution.gap.dtype == solution.primal.dtype == torch.float32
    reference = solve(random_problem(2, penalties, epsilon=0.2))
    assert_close(solution.coupling, reference.coupling.float())
    assert abs(float(solution.gap)) <= 1e-5 * max(1.0, float(solution.primal.abs()))


def test_readable():
    text = repr(solve(random_problem(2, (INF, 2.0), batch=(3,))))
    assert "queries=5, keys=7" in text
    assert "3 of 3 converged" in text
    assert "gap=" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("penalties", ALL)
def test_device(penalties):
    problem = random_problem(2, penalties, batch=(2,))
    moved = problem.with_tensors(*(None if tensor is None else tensor.cuda() for tensor in problem.tensors))
    assert_close(solve(moved).coupling.cpu(), solve(problem).coupling, tolerance=1e-11)
