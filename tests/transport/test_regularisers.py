"""One-sided transport under Tsallis's divergence: solutions, gradients and certificates against independent oracles."""

import math

import numpy as np
import pytest
import torch

from eotattn.transport import Newton, TransportProblem, TransportSolution, Tsallis, certify, pot, solve
from eotattn.transport.optimality.objective import primal_objective

INF = math.inf
ALPHAS = (1.0001, 1.1, 1.5, 1.7, 2.0)


def bisection(score, log_prior, epsilon, alpha):
    """Weights by bisection on the threshold in the widest arithmetic at hand, the formula as the literature has it."""
    beta = np.longdouble(alpha) - 1
    nats = log_prior.numpy().astype(np.longdouble)
    wide = np.where(nats > -INF, score.numpy().astype(np.longdouble), -INF) / np.longdouble(epsilon)
    wide = np.broadcast_to(wide, np.broadcast_shapes(wide.shape, nats.shape))
    low, high = wide.max(-1, keepdims=True), wide.max(-1, keepdims=True) + 1 / beta

    def weights(threshold):
        return np.exp(nats) * np.maximum(0, 1 + beta * (wide - threshold)) ** (1 / beta)

    distance = np.longdouble(1)
    while (weights(low).sum(-1) < 1).any():
        low, distance = low - distance, 2 * distance
    for _ in range(90):
        middle = (low + high) / 2
        above = weights(middle).sum(-1, keepdims=True) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return torch.as_tensor(weights(low).astype(np.float64))


def random_rows(seed=0, shape=(3, 17, 23), scale=2.0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    score, log_prior = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    log_prior = spread * log_prior
    log_prior[torch.rand(shape, generator=generator) < 0.3] = -INF
    log_prior[..., 4] = 0.0
    return scale * score, log_prior


def stated(seed=0, alpha=1.5, epsilon=0.7, **options):
    score, log_prior = random_rows(seed, **options)
    return TransportProblem(score, epsilon=epsilon, log_prior=log_prior, regulariser=Tsallis(alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [1e-6, 0.3, 3.0, 1e3])
def test_weights_are_those_of_bisection(alpha, scale):
    problem = stated(1, alpha, scale=scale)
    found = solve(problem).attention_weights
    assert float((found - bisection(problem.score, problem.log_prior, 0.7, alpha)).abs().max()) <= 1e-10
    assert float((found.sum(-1) - 1).abs().max()) <= 1e-12
    assert (found[problem.log_prior.expand(found.shape) == -INF] == 0).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_extreme_scores_and_priors(alpha):
    """Scores of 1e9, far apart or all alike, and keys whose prior keeps the highest score from the weight."""
    far = torch.tensor([[1e9, 0.0, -1e9, 0.3], [1e9, 1e9 - 0.5, 1e9 + 0.25, -1e9], [0.0, 0.0, 0.0, 0.0]]).double()
    rare = torch.tensor([[-40.0, 0.0, 0.0, -0.5], [0.0, 0.0, -1.0, 0.0], [-60.0, -30.0, -0.1, -INF]]).double()
    found = solve(TransportProblem(far, log_prior=rare, regulariser=Tsallis(alpha))).attention_weights
    assert float((found - bisection(far, rare, 1.0, alpha)).abs().max()) <= 1e-10
    alone = solve(TransportProblem(far[:1], epsilon=1e-300, regulariser=Tsallis(alpha))).attention_weights
    assert alone.tolist() == [[1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("m", [1, 2, 500])
def test_sparsemax_is_pots_projection_onto_the_simplex(m):
    import ot

    score = 2 * torch.randn(9, m, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    found = solve(TransportProblem(score, epsilon=0.4, regulariser=Tsallis(2))).attention_weights
    expected = ot.utils.proj_simplex((score / 0.4).T.numpy())
    assert float((found.T - torch.as_tensor(expected)).abs().max()) <= 1e-12


@pytest.mark.filterwarnings("ignore:.*`disp` and `iprint`:DeprecationWarning")
def test_sparsemax_is_pots_transport_at_its_own_key_marginal():
    """There the constraint is idle, and POT's dual solver of quadratic transport shares nothing with a threshold."""
    import ot

    score = torch.randn(6, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    coupling = solve(TransportProblem(score, epsilon=0.5, regulariser=Tsallis(2.0))).coupling
    marginals = torch.full((6,), 1 / 6).double().numpy(), coupling.sum(0).numpy()
    expected = ot.smooth.smooth_ot_dual(
        *marginals, -score.numpy(), 0.5 * 6, reg_type="l2", stopThr=1e-15, numItermax=9000
    )
    assert float((coupling - torch.as_tensor(expected)).abs().max()) <= 1e-6


def test_the_limit_of_alpha_is_the_softmax():
    score, log_prior = random_rows(2)
    exact = (score / 0.7 + log_prior).softmax(-1)
    for excess in (1e-3, 1e-6, 1e-9):
        problem = TransportProblem(score, epsilon=0.7, log_prior=log_prior, regulariser=Tsallis(1 + excess))
        assert float((solve(problem).attention_weights - exact).abs().max()) <= 20 * excess


def test_a_batch_broadcasts_and_is_solved_as_if_each_stood_alone():
    score, _ = random_rows(4, shape=(3, 1, 5, 7))
    _, log_prior = random_rows(5, shape=(2, 5, 7))
    epsilon = torch.tensor([[[0.2]], [[1.0]], [[3.0]]]).double()
    options = {"regulariser": Tsallis(1.5)}
    together = solve(TransportProblem(score, epsilon=epsilon, log_prior=log_prior, **options))
    assert together.attention_weights.shape == (3, 2, 5, 7)
    assert together.certificate.gap.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            problem = TransportProblem(score[i, 0], epsilon=float(epsilon[i]), log_prior=log_prior[j], **options)
            alone = solve(problem)
            for name in ("attention_weights", "query_potential", "primal", "dual"):
                assert float((getattr(together, name)[i, j] - getattr(alone, name)).abs().max()) <= 1e-12


@pytest.mark.parametrize("alpha", ALPHAS)
def test_float32_rounds_and_no_more(alpha):
    problem = stated(6, alpha)
    narrow = problem.with_tensors(*(None if x is None else x.float() for x in problem.tensors))
    solution, exact = solve(narrow), solve(problem).attention_weights
    assert solution.attention_weights.dtype == torch.float32
    assert float((solution.attention_weights - exact).abs().max()) <= 1e-4
    assert float(((solution.coupling - solve(problem).coupling).abs().sum((-2, -1))).max()) <= float(
        solution.certificate.distance.min() * 10
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_coupling_is_the_best_one(alpha):
    """No feasible coupling nearby has a lower objective, which is evaluated from its definition."""
    problem = stated(7, alpha, shape=(5, 6))
    solution = solve(problem)
    beta, reference = alpha - 1, problem.query_marginal[:, None] * problem.log_prior.exp()

    def objective(coupling):
        inside = reference > 0
        ratio = coupling[inside] / reference[inside]
        divergence = reference[inside] * (ratio**alpha - alpha * ratio + beta) / (alpha * beta)
        return 0.7 * divergence.sum() - (coupling * problem.score).sum()

    best = objective(solution.coupling)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = torch.rand(5, 6, generator=generator, dtype=torch.float64) * (reference > 0)
        other = other / other.sum(-1, keepdim=True) / 5
        for step in (1e-3, 1e-1, 1.0):
            value = objective(torch.lerp(solution.coupling, other, step)) - best
            assert value > -1e-9
            rows = 5 * torch.lerp(solution.coupling, other, step)
            gap = certify(rows, problem.score, problem.log_prior, 0.7, regulariser=problem.regulariser).gap
            assert float((gap - value).abs()) <= 1e-10 / beta
    size = max(1.0, float(best.abs()))
    for value in (solution.primal, solution.dual, primal_objective(problem, solution.coupling)):
        assert float((value - best).abs()) <= 1e-10 * size / beta  # what the definition loses by cancellation


def test_queries_without_mass_have_weights_and_send_nothing():
    mass = torch.tensor([0.5, 0.0, 0.5]).double()
    score, log_prior = random_rows(8, shape=(3, 9))
    options = {"log_prior": log_prior, "regulariser": Tsallis(1.5)}
    solution = solve(TransportProblem(score, query_marginal=mass, **options))
    assert torch.equal(solution.attention_weights, solve(TransportProblem(score, **options)).attention_weights)
    assert (solution.coupling[1] == 0).all()
    assert torch.allclose(solution.query_mass, mass)
    assert torch.allclose(solution.key_mass, solution.coupling.sum(0))
    assert float(solution.certificate.gap) <= 1e-13
    value = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights, coupling = solution.attention_weights, solution.coupling
    for found, expected in (
        (solution.attend(value), weights @ value),
        (solution.apply(value), coupling @ value),
        (solution.apply_transpose(value[:3]), coupling.T @ value[:3]),
        (solution.top_keys(torch.tensor([2]), 3)[0], weights[2:].topk(3).values),
    ):
        assert torch.allclose(found, expected, atol=1e-14)


def test_a_new_query_has_the_threshold_of_its_row():
    score, _ = random_rows(9, shape=(4, 7))
    solution = solve(TransportProblem(score, epsilon=0.3, regulariser=Tsallis(1.5)))
    assert torch.allclose(solution.query_potential_at(score[1:3]), solution.query_potential[1:3], atol=1e-13)


def central(function, x, size=1e-6):
    """Central differences of a scalar function, entry by entry."""
    found = torch.zeros_like(x)
    for index in np.ndindex(*x.shape):
        step = torch.zeros_like(x)
        step[index] = size
        found[index] = (function(x + step) - function(x - step)) / (2 * size)
    return found


@pytest.mark.parametrize("alpha", [1.1, 1.5, 1.7, 2.0])
@pytest.mark.parametrize("read", ["attention_weights", "coupling", "query_potential", "primal", "dual", "attend"])
def test_gradients_are_those_of_finite_differences(alpha, read):
    generator = torch.Generator().manual_seed(5)
    score = 1.5 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    log_prior = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    value = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    mass = torch.tensor([0.2, 0.0, 0.8], dtype=torch.float64)
    epsilon = torch.tensor([0.8], dtype=torch.float64)
    target = torch.randn(3, 5, generator=generator, dtype=torch.float64)

    def outcome(score, log_prior, mass, epsilon):
        options = {"query_marginal": mass / mass.sum(), "regulariser": Tsallis(alpha)}
        solution = solve(TransportProblem(score, epsilon=epsilon, log_prior=log_prior, **options))
        found = solution.attend(value) if read == "attend" else getattr(solution, read)
        if found.dim() < 2:
            return (found * target[:, 0]).sum() if found.dim() else found
        return (found * target[:, : found.shape[1]]).sum()

    arguments = [score, log_prior, mass, epsilon]
    leaves = [one.clone().requires_grad_() for one in arguments]
    gradients = torch.autograd.grad(outcome(*leaves), leaves, allow_unused=True)
    for k, gradient in enumerate(gradients):
        if k == 2:  # an entry of zero mass cannot be lowered
            continue

        def along(x, k=k):
            return outcome(*arguments[:k], x, *arguments[k + 1 :])

        expected = central(along, arguments[k])
        found = torch.zeros_like(expected) if gradient is None else gradient
        assert float((found - expected).abs().max()) <= 1e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_jacobian_is_its_formula(alpha):
    """diag(b) - b b^T / sum(b), b = prior^(alpha - 1) weight^(2 - alpha) on the support, over epsilon."""
    score, log_prior = random_rows(10, shape=(1, 9), scale=0.3)

    def weights(row):
        problem = TransportProblem(row, epsilon=0.6, log_prior=log_prior, regulariser=Tsallis(alpha))
        return solve(problem).attention_weights[0]

    found = torch.autograd.functional.jacobian(weights, score)[:, 0]
    p = bisection(score, log_prior, 0.6, alpha)[0]
    bend = torch.where(p > 0, log_prior[0].exp() ** (alpha - 1) * p ** (2 - alpha), 0.0)
    expected = (torch.diag(bend) - bend[:, None] * bend / bend.sum()) / 0.6
    assert float((found - expected).abs().max()) <= 1e-9
    assert float(expected.abs().max()) > 1e-2


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0])
def test_second_derivatives(alpha):
    score = torch.tensor([[0.3, -0.2, 0.9, 0.1], [0.0, 2.0, 0.2, -0.4]]).double().requires_grad_()
    log_prior = torch.tensor([[0.1, 0.4, -0.3, 0.2]]).double().expand(2, 4).clone().requires_grad_()

    def potential(score, log_prior):
        return solve(TransportProblem(score, log_prior=log_prior, regulariser=Tsallis(alpha))).query_potential

    assert torch.autograd.gradcheck(potential, (score, log_prior), atol=1e-6)
    assert torch.autograd.gradgradcheck(potential, (score, log_prior), atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_an_exact_solution_is_certified_as_one(alpha):
    for scale in (0.1, 2.0, 50.0):
        problem = stated(11, alpha, scale=scale, shape=(30, 5, 9))
        solution = solve(problem)
        certificate, weights = solution.certificate, solution.attention_weights
        true = (weights - bisection(problem.score, problem.log_prior, 0.7, alpha)).abs().sum(-1).mean(-1)
        given = certify(weights, problem.score, problem.log_prior, 0.7, regulariser=problem.regulariser)
        assert (true <= torch.minimum(certificate.distance, given.distance)).all()
        assert (certificate.gap >= 0).all()
        assert float(certificate.gap.max()) <= 1e-13
        assert float(certificate.distance.max()) <= 1e-10 * max(1.0, scale)
        assert certificate.converged.all()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", [1e-13, 1e-9, 1e-4, 0.3])
def test_the_certificate_of_any_potentials_and_any_weights_is_sound(alpha, size):
    generator = torch.Generator().manual_seed(6)
    for seed in range(2):
        problem = stated(seed, alpha, shape=(9, 7, 9), scale=3.0)
        exact = bisection(problem.score, problem.log_prior, 0.7, alpha)
        solution = solve(problem)
        noise = size * torch.randn(2, 9, 7, 9, generator=generator, dtype=torch.float64)
        moved = solution.query_potential + noise[0, ..., 0]
        none = torch.zeros(9, dtype=torch.int64)
        other = TransportSolution(problem, moved, solution.key_potential, none, none > 0, "given").certificate
        optimum = float(solution.primal.abs().max())
        assert (other.dual <= solution.primal + 1e-13 * optimum).all()
        assert (other.distance >= (solution.coupling - exact / 7).abs().sum((-2, -1))).all()
        weights = (exact + noise[1].abs() * (problem.log_prior > -INF)) * noise[0].exp()
        certificate = certify(weights, problem.score, problem.log_prior, 0.7, regulariser=problem.regulariser)
        true = (weights - exact).abs().sum(-1).mean(-1)
        assert (true <= certificate.distance).all()
        assert (certificate.distance <= 1.001 * true + 1e-10).all()
        # The bound that needs no exact solution holds too, and by the same constant.
        rows = weights / weights.sum(-1, keepdim=True)
        strength = 2 ** (3 - alpha) * (problem.log_prior.exp().sum(-1) ** (alpha - 1)).mean(-1)
        apart = (rows - exact).abs().sum(-1).mean(-1)
        assert (apart <= (strength * certificate.gap / 0.7).sqrt() * (1 + 1e-9) + 1e-12).all()


def test_mass_on_a_forbidden_pair_has_no_finite_gap():
    score, log_prior = random_rows(12, shape=(4, 9))
    weights = torch.full((4, 9), 1 / 9).double()
    certificate = certify(weights, score, log_prior, regulariser=Tsallis(1.5))
    assert float(certificate.gap) == INF
    assert not certificate.converged


def test_autocast_changes_nothing():
    problem = stated(13, 1.5)
    expected = solve(problem).attention_weights
    with torch.autocast("cpu", torch.bfloat16):
        solution = solve(problem)
        assert torch.equal(solution.attention_weights, expected)
        assert float(solution.gap.max()) <= 1e-13


SCORE = torch.zeros(2, 3)
WRONG = [
    (lambda: Tsallis(1.0), ValueError, r"Tsallis: alpha must lie in \(1, 2\]; got 1.0"),
    (lambda: Tsallis(2.5), ValueError, r"alpha must lie in \(1, 2\]"),
    (lambda: Tsallis(math.nan), ValueError, r"alpha must lie in \(1, 2\]"),
    (lambda: Tsallis("2"), TypeError, "alpha must be a number"),
    (lambda: TransportProblem(SCORE, regulariser="sparsemax"), TypeError, "regulariser must be a Tsallis"),
    (
        lambda: TransportProblem(SCORE, regulariser=Tsallis(2), key_marginal=torch.full((3,), 1 / 3)),
        NotImplementedError,
        "TransportProblem: regulariser must be left out unless keys are free",
    ),
    (
        lambda: TransportProblem(SCORE, regulariser=Tsallis(2), query_penalty=1.0),
        NotImplementedError,
        "regulariser must be left out unless keys are free, the query penalty infinite",
    ),
    (
        lambda: TransportProblem(
            TransportProblem.from_points(SCORE, SCORE, epsilon=1.0).affinity, regulariser=Tsallis(2)
        ),
        NotImplementedError,
        "pairs at hand",
    ),
    (
        lambda: TransportProblem(SCORE, log_prior=torch.full((2, 3), -60.0), regulariser=Tsallis(2)),
        ValueError,
        "log_prior must have its largest entry of a row within 44.4 nats of zero .* Normalise it",
    ),
    (lambda: solve(TransportProblem(SCORE, regulariser=Tsallis(2)), Newton()), NotImplementedError, "key_marginal"),
    (lambda: pot.solve(TransportProblem(SCORE, regulariser=Tsallis(2))), NotImplementedError, "no call of POT"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_what_cannot_be_served_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
