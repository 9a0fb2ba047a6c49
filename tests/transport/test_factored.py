"""Factored problems against the same problems stated densely, POT, and the size of every tensor they make."""

import pytest
import torch
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transport_problems import FREE, INF, SOLVERS, TWO_SIDED, UNBALANCED

from eotattn.priors import RecencyPrior, SinkPrior, goat_prior
from eotattn.transport import Auto, TransportProblem, pot, solve
from eotattn.transport.problems.affinity import Affinity

ALL = TWO_SIDED + UNBALANCED + FREE
HEADS, QUERIES, KEYS, WIDTH = 3, 11, 14, 5


def marginals(generator, penalties, *, zeros=False, sizes=(QUERIES, KEYS), heads=HEADS):
    query = torch.rand(sizes[0], generator=generator, dtype=torch.float64) + 0.05
    key = torch.rand(heads, sizes[1], generator=generator, dtype=torch.float64) + 0.05
    if zeros:
        query[1], key[:, 2] = 0, 0
    options = {"query_marginal": query / query.sum(), "query_penalty": penalties[0]}
    if penalties[1] is not None:
        options |= {"key_marginal": key / key.sum(-1, keepdim=True), "key_penalty": penalties[1]}
    return options


def factored_and_dense(seed, penalties, *, prior=True, zeros=False, epsilon=0.7, offset=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        scale * torch.randn(HEADS, length, WIDTH, generator=generator, dtype=torch.float64)
        for length in (QUERIES, KEYS)
    )
    options = {"epsilon": epsilon, **marginals(generator, penalties, zeros=zeros)}
    log_prior = goat_prior(HEADS) + RecencyPrior(HEADS) + SinkPrior(HEADS) if prior else None
    positions = torch.arange(QUERIES) + offset, torch.arange(KEYS)
    places = {"query_positions": positions[0], "key_positions": positions[1]} if prior else {}
    factored = TransportProblem.from_factors(query, key, prior=log_prior, **places, **options)
    table = log_prior.dense(*positions, dtype=torch.float64).detach() if prior else None
    return factored, TransportProblem(torch.einsum("hqd,hkd->hqk", query, key), log_prior=table, **options)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("penalties", ALL)
def test_streaming_equals_dense_equals_pot(penalties, zeros, prior):
    factored, dense = factored_and_dense(1, penalties, zeros=zeros, prior=prior, offset=4)
    solution = solve(factored).raise_if_not_converged()
    assert solution.solver == ("Anderson" if penalties[1] is not None else "ClosedForm")
    expected, oracle = solve(dense), pot.solve(dense)
    assert_close(solution.coupling, expected.coupling, tolerance=1e-10)
    assert_close(solution.coupling, oracle.coupling, tolerance=1e-10)
    for name in ("primal", "dual", "cost", "entropy"):
        assert_close(getattr(solution, name), getattr(expected, name), tolerance=1e-10)
    assert_close(solution.primal, oracle.value, tolerance=1e-10)
    assert (solution.gap >= 0).all()
    assert (solution.gap <= 1e-12 * solution.primal.abs().clamp(min=1)).all()


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("growth", [0.0, 0.3, 1.0])
def test_the_exchange_in_nats_is_two_soft_c_transforms(growth, direction):
    generator = torch.Generator().manual_seed(4)
    query, key = (torch.randn(HEADS, KEYS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    padding = torch.arange(KEYS) == KEYS - 1
    prior = (RecencyPrior(HEADS) + SinkPrior(HEADS)).requires_grad_(False)
    options = {"epsilon": 0.7, "key_padding": padding, "is_causal": direction == 1}
    with_rows = TransportProblem.from_factors(query, key, prior=prior, **options).affinity
    assert with_rows.query_log_prior is not None
    potential = torch.randn(HEADS, KEYS, generator=generator, dtype=torch.float64)
    potential[:, 2], potential[:, -1] = -INF, INF
    marginal = torch.rand(KEYS, generator=generator, dtype=torch.float64)
    marginal[1] = 0
    cases = [(with_rows, potential)]
    if not direction:
        points = TransportProblem.from_points(query, key, epsilon=0.7).affinity
        cases.append((points, potential.nan_to_num(posinf=1.0, neginf=-INF)))
    for affinity, price in cases:
        found = affinity.exchange(0.7, marginal.log(), growth)(price)
        expected = Affinity.exchange(affinity, 0.7, marginal.log(), growth)(price)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.isinf(), theirs.isinf())
            assert_close(ours.nan_to_num(neginf=0.0), theirs.nan_to_num(neginf=0.0), tolerance=1e-12)


@pytest.mark.parametrize("method", ["sinkhorn", "anderson", "newton"])
@pytest.mark.parametrize("penalties", TWO_SIDED + UNBALANCED)
def test_every_method_on_every_structure(penalties, method):
    factored, dense = factored_and_dense(2, penalties, epsilon=0.3)
    expected = pot.solve(dense).coupling
    for problem in (factored, dense):
        assert_close(solve(problem, solver=method).raise_if_not_converged().coupling, expected, tolerance=1e-10)


@pytest.mark.parametrize("penalties", ALL)
def test_outputs_without_the_coupling(penalties):
    factored, dense = factored_and_dense(3, penalties, zeros=True)
    solution, coupling = solve(factored), solve(dense).coupling
    generator = torch.Generator().manual_seed(0)
    value, other = (torch.randn(size, 2, generator=generator, dtype=torch.float64) for size in (KEYS, QUERIES))
    assert_close(solution.apply(value), coupling @ value, tolerance=1e-10)
    assert_close(solution.apply_transpose(other), coupling.mT @ other, tolerance=1e-10)
    assert_close(solution.query_mass, coupling.sum(-1), tolerance=1e-10)
    assert_close(solution.key_mass, coupling.sum(-2), tolerance=1e-10)
    assert_close(solution.attend(value), solve(dense).attention_weights @ value, tolerance=1e-10)
    assert_close(solution.cost, -(coupling * dense.score).sum((-2, -1)), tolerance=1e-10)
    assert_close(solution.entropy, torch.special.entr(coupling).sum((-2, -1)), tolerance=1e-10)
    weights, keys = solution.top_keys(torch.tensor([4, 0]), 3)
    rows = solve(dense).attention_weights[:, [4, 0]]
    assert_close(weights, rows.sort(-1, descending=True).values[..., :3], tolerance=1e-10)
    assert_close(rows.gather(-1, keys), weights, tolerance=1e-10)


@pytest.mark.parametrize("penalties", [(INF, None), (INF, INF)])
def test_one_problem_serves_a_batch_of_values(penalties):
    factored, dense = factored_and_dense(3, penalties)
    value = torch.randn(2, 1, KEYS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(solve(factored).apply(value), solve(dense).coupling @ value, tolerance=1e-10)
    with pytest.raises(ValueError, match=r"value must have leading dimensions that broadcast with \(3,\)"):
        solve(factored).apply(value.expand(2, 2, KEYS, 2))


class LargestTensor(TorchDispatchMode):
    """Remember the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("method", ["sinkhorn", "anderson", "newton"])
def test_no_tensor_grows_with_queries_times_keys(method):
    length, width = 600, 4
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(length, width, generator=generator).requires_grad_() for _ in range(2))
    uniform = torch.full((length,), 1 / length)
    with LargestTensor() as largest:
        problem = TransportProblem.from_factors(query, key, epsilon=2.0, key_marginal=uniform)
        solution = solve(problem, solver=SOLVERS[method](tolerance=1e-4, max_iterations=20))
        (solution.apply(key).square().sum() + solution.dual.sum()).backward()
    assert largest.numel <= 8 * length * (width + 8)
    with LargestTensor() as control:
        assert solution.coupling.shape == (length, length)
    assert control.numel >= length**2


def test_points_are_squared_distances():
    generator = torch.Generator().manual_seed(5)
    query, key = (torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (9, 12))
    options = {"epsilon": 0.5, "key_marginal": torch.full((12,), 1 / 12, dtype=torch.float64)}
    problem = TransportProblem.from_points(query, key, **options)
    distances = (query[:, None] - key[None]).square().sum(-1)
    dense = TransportProblem(-distances, **options)
    assert_close(problem.score, -distances)
    solution = solve(problem)
    assert_close(solution.coupling, pot.solve(dense).coupling, tolerance=1e-10)
    assert_close(solution.cost, (pot.solve(dense).coupling * distances).sum(), tolerance=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_points_far_from_the_origin(dtype, tolerance):
    generator = torch.Generator().manual_seed(5)
    query, key = (1000 + torch.rand(2, size, 3, generator=generator, dtype=dtype) for size in (9, 12))
    uniform = torch.full((12,), 1 / 12, dtype=dtype)
    leaf = query.clone().requires_grad_()
    problem = TransportProblem.from_points(leaf, key, epsilon=0.05, key_marginal=uniform)
    solution = solve(problem, solver=Auto(tolerance=0.1 * tolerance))
    difference = query.double()[:, :, None] - key.double()[:, None]
    options = {"epsilon": 0.05, "key_marginal": torch.full((12,), 1 / 12, dtype=torch.float64)}
    coupling = solve(TransportProblem(-difference.square().sum(-1), **options)).coupling
    assert float((solution.coupling.detach() - coupling).abs().sum((-2, -1)).max()) <= 10 * tolerance
    assert float(solution.certificate.key_error.max()) <= 10 * tolerance
    (gradient,) = torch.autograd.grad(solution.dual.sum(), leaf)
    assert_close(gradient, 2 * (coupling[..., None] * difference).sum(-2), tolerance=10 * tolerance)


@pytest.mark.parametrize("penalties", [(INF, None), (0.7, None), (INF, 2.0), (1.0, 3.0)])
def test_causal_and_padded_equal_a_mask(penalties):
    generator = torch.Generator().manual_seed(6)
    query, key = (torch.randn(2, 8, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[0, 5:] = padding[1, 3] = True
    options = marginals(generator, penalties, sizes=(8, 8), heads=2)
    prior = RecencyPrior(2)
    problem = TransportProblem.from_factors(
        query, key, epsilon=1.3, prior=prior, is_causal=True, key_padding=padding, **options
    )
    place = torch.arange(8)
    forbidden = torch.ones(8, 8).triu(1).bool() | padding[:, None]
    table = prior.dense(place, place, dtype=torch.float64).detach().masked_fill(forbidden, -INF)
    dense = TransportProblem(query @ key.mT, epsilon=1.3, log_prior=table, **options)
    solution, expected = solve(problem), solve(dense)
    assert_close(solution.coupling, expected.coupling, tolerance=1e-10)
    assert_close(solution.key_mass, expected.coupling.sum(-2), tolerance=1e-10)
    assert_close(solution.primal, expected.primal, tolerance=1e-10)
    assert torch.equal(problem.log_prior == -INF, table == -INF)
    assert_close(problem.log_prior.masked_fill(forbidden, 0.0), table.masked_fill(forbidden, 0.0))
    assert (solution.gap <= 1e-12 * solution.primal.abs().clamp(min=1)).all()


@pytest.mark.parametrize("penalties", [(INF, INF), (1.0, 3.0)])
def test_float32(penalties):
    factored, dense = factored_and_dense(7, penalties)
    tensors = [None if tensor is None else tensor.detach().float() for tensor in factored.tensors]
    solution = solve(factored.with_tensors(*tensors), solver=Auto(tolerance=1e-6)).raise_if_not_converged()
    expected = solve(dense).coupling
    for mass, exact in ((solution.key_mass, expected.sum(-2)), (solution.query_mass, expected.sum(-1))):
        assert float(((mass - exact).abs() / exact).max()) <= 1e-5
    assert float(solution.certificate.key_error.max()) <= 1e-5
    assert float(solution.certificate.distance.max()) <= 1e-2


@pytest.mark.parametrize("prior", [False, True])
def test_bfloat16_kernels_keep_the_potentials(prior):
    # The inputs are exact in bfloat16, so only the arithmetic differs; one lane for a price would lose two digits.
    generator = torch.Generator().manual_seed(8)
    query, key = (torch.randn(2, 40, 8, generator=generator).bfloat16() for _ in range(2))
    log_prior = goat_prior(2).freeze() if prior else None
    options = {"epsilon": 0.5, "prior": log_prior}
    uniform = torch.full((40,), 1 / 40, dtype=torch.float64)
    narrow = TransportProblem.from_factors(query, key, key_marginal=uniform.float(), **options)
    wide = TransportProblem.from_factors(query.double(), key.double(), key_marginal=uniform, **options)
    solution, exact = solve(narrow, solver=Auto(tolerance=1e-4)), solve(wide)
    assert solution.converged.all()
    assert float(solution.certificate.key_error.max()) <= 3e-4
    assert float((solution.coupling - exact.coupling).abs().sum((-2, -1)).max()) <= 2e-3
    distance = (solution.coupling - exact.coupling).abs().sum((-2, -1)).double()
    assert (distance <= solution.certificate.distance + 1e-6).all()
    assert "fused in bfloat16" in str(solution.certificate)


def test_a_warm_start_saves_iterations():
    factored, _ = factored_and_dense(9, (INF, INF), epsilon=0.3)
    stated = Auto(tolerance=1e-9)
    cold = solve(factored, solver=stated)
    warm = solve(factored, start=cold.key_potential, solver=stated)
    assert int(warm.num_iterations.max()) == 0 < int(cold.num_iterations.min())
    cold = solve(factored)  # down to the floor of rounding, where a step or two may tell that it is the floor
    warm = solve(factored, start=cold.key_potential)
    assert int(warm.num_iterations.max()) < int(cold.num_iterations.min()) / 2
    nearby = factored.with_tensors(factored.tensors[0] * 1.001, *factored.tensors[1:])
    warm = solve(nearby, start=cold.key_potential, solver=stated).num_iterations
    assert int(warm.max()) < int(solve(nearby, solver=stated).num_iterations.min())


def test_problems_of_a_batch_end_where_they_would_alone():
    factored, _ = factored_and_dense(10, (INF, 2.0))
    together = solve(factored, solver=Auto(tolerance=1e-12))
    for head in range(HEADS):
        tensors = [
            None if x is None else x[head : head + 1] if x.dim() > 1 and x.shape[0] == HEADS else x
            for x in factored.tensors
        ]
        alone = solve(factored.with_tensors(*tensors), solver=Auto(tolerance=1e-12))
        assert_close(together.coupling[head : head + 1], alone.coupling, tolerance=1e-10)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-2])
def test_small_epsilon_converges_or_says_why_not(epsilon):
    generator = torch.Generator().manual_seed(11)
    query, key = (torch.rand(60, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    uniform = torch.full((60,), 1 / 60, dtype=torch.float64)
    problem = TransportProblem.from_points(query, key, epsilon=epsilon, key_marginal=uniform)
    # Extrapolation helps down to about a hundredth of the range of costs; below, Newton's method is for accuracy.
    for method in ("newton", "anderson")[: 1 if epsilon < 1e-2 else 2]:
        solution = solve(problem, solver=SOLVERS[method](tolerance=1e-9, max_iterations=2000))
        assert solution.converged
        if epsilon >= 1e-2:
            assert_close(solution.coupling, pot.solve(problem).coupling, tolerance=1e-7)
        assert float(solution.certificate.distance) <= 1e-5
    short = solve(problem, solver=Auto(tolerance=1e-12, max_iterations=3))
    assert not short.converged
    assert short.coupling.isfinite().all()
    with pytest.raises(RuntimeError, match="not converged by Anderson after 3 iterations"):
        short.raise_if_not_converged()


@pytest.mark.parametrize("penalties", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_huge_scores_never_make_nan(penalties, dtype):
    factored, _ = factored_and_dense(12, penalties, zeros=True, scale=15.0, epsilon=0.5)
    problem = factored.with_tensors(*(None if tensor is None else tensor.to(dtype) for tensor in factored.tensors))
    assert float(problem.score.abs().max()) > 500
    solution = solve(problem, Auto() if penalties[1] is None else Auto(max_iterations=300))
    for tensor in (solution.coupling, solution.key_mass, solution.query_mass, solution.query_potential):
        assert not tensor.isnan().any()
    for name in ("gap", "cost", "entropy", "marginal_error"):
        assert not getattr(solution, name).isnan().any()
