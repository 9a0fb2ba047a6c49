"""Each theorem over random problems: it holds, it is tight where it should be, and a broken one would be seen."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from eotattn.priors import FourierPrior, RecencyPrior, SinkPrior
from eotattn.transport import theorems

problems = settings(max_examples=40, deadline=None, derandomize=True)
SEED, SCALE, EPSILON = st.integers(0, 10_000), st.floats(0.0, 60.0), st.floats(0.05, 5.0)


def drawn(seed, scale=1.0, *, masked=False, sizes=(4, 6)):
    generator = torch.Generator().manual_seed(seed)
    score, log_prior = (scale * torch.randn(*sizes, generator=generator, dtype=torch.float64) for _ in range(2))
    if masked:
        forbidden = torch.rand(*sizes, generator=generator) < 0.4
        forbidden[:, 0] = False
        log_prior = log_prior.masked_fill(forbidden, -math.inf)
    return score, log_prior


@problems
@given(seed=SEED, scale=SCALE, epsilon=EPSILON, masked=st.booleans())
def test_collapse_to_the_prior(seed, scale, epsilon, masked):
    score, log_prior = drawn(seed, scale, masked=masked)
    assert theorems.collapse_to_the_prior(score, log_prior, epsilon=epsilon).holds(1e-10)
    still = theorems.collapse_to_the_prior(torch.full_like(score, 3.0), log_prior, epsilon=epsilon)
    assert_close(still.left, torch.zeros_like(still.left), tolerance=1e-10)
    assert float(still.right.max()) == 0.0


def test_collapse_is_attained_in_the_limit():
    # One key above many equal ones: its log-ratio tends to the range.
    score = torch.zeros(1, 100_000, dtype=torch.float64)
    score[0, 0] = 1.0
    comparison = theorems.collapse_to_the_prior(score)
    assert 0 <= float(comparison.slack[0, 0]) < 1e-4


@problems
@given(seed=SEED, scale=SCALE, epsilon=EPSILON, masked=st.booleans())
def test_sink_margin_and_sensitivity(seed, scale, epsilon, masked):
    score, log_prior = drawn(seed, scale, masked=masked)
    margin = theorems.sink_margin(score, log_prior, epsilon=epsilon)
    logits = score / epsilon + log_prior
    expected = (logits[:, :1] - logits[:, 1:]).amin(-1)
    assert torch.equal(margin.left.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert_close(margin.left[finite], expected[finite])
    assert_close(margin.content[finite] + margin.prior[finite], expected[finite])
    sensitivity = theorems.context_sensitivity(score, log_prior, epsilon=epsilon)
    assert_close(sensitivity.left, 1 - logits.softmax(-1)[:, 0])
    assert sensitivity.holds()


@pytest.mark.parametrize("margin", [-3.0, 0.0, 2.0, 50.0])
def test_sensitivity_bound_is_attained_by_equal_competitors(margin):
    log_prior = torch.zeros(1, 33, dtype=torch.float64)
    log_prior[0, 0] = margin
    comparison = theorems.context_sensitivity(torch.zeros_like(log_prior), log_prior)
    assert_close(comparison.left, comparison.right, tolerance=1e-15)
    assert_close(comparison.right, torch.tensor([32 / (math.exp(margin) + 32)], dtype=torch.float64))


@problems
@given(seed=SEED, scale=st.floats(0.0, 10.0))
def test_value_perturbation(seed, scale):
    score, log_prior = drawn(seed, scale)
    generator = torch.Generator().manual_seed(seed + 1)
    value, shift = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    shift[0] = 0
    assert theorems.value_perturbation(score, value, shift, log_prior).holds()
    same = shift[1:2].expand(6, 3).clone()
    same[0] = 0
    tight = theorems.value_perturbation(score, value, same, log_prior)
    assert_close(tight.left, tight.right)


@problems
@given(seed=SEED, rank=st.integers(1, 4))
def test_trigonometric_class(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    frequencies = 0.3 + 0.6 * torch.arange(rank) + 0.2 * torch.rand(rank, generator=generator, dtype=torch.float64)
    even, odd = torch.rand(2, rank, generator=generator, dtype=torch.float64) + 0.2
    angle = frequencies * torch.arange(-20, 21)[:, None]
    kappa = (even * angle.cos() + odd * angle.sin()).sum(-1)
    found = theorems.trigonometric_factors(kappa)
    assert found.rank == 2 * rank
    assert_close(found.frequencies[rank:], frequencies, tolerance=1e-7)
    assert_close(found.frequencies, -found.frequencies.flip(0), tolerance=1e-7)
    assert_close(found.moduli, torch.ones(2 * rank, dtype=torch.float64), tolerance=1e-7)
    assert found.holds(1e-8)
    table = kappa[20 + torch.arange(20)[:, None] - torch.arange(20)]
    assert int(torch.linalg.matrix_rank(table, rtol=1e-9)) == found.rank


def test_trigonometric_class_of_a_fourier_prior_and_of_decay():
    prior = FourierPrior(1, num_frequencies=2, min_period=4.0, max_period=16.0)
    with torch.no_grad():
        prior.even.copy_(torch.tensor([[0.7, -0.4]]))
    table = prior.dense(torch.arange(40), torch.zeros(1, dtype=torch.int64), dtype=torch.float64)[0, :, 0].detach()
    found = theorems.trigonometric_factors(table)
    assert_close(
        found.frequencies[found.rank // 2 :].sort().values,
        torch.tensor(sorted(prior.frequencies), dtype=torch.float64),
        tolerance=1e-6,
    )
    decay = theorems.trigonometric_factors(0.5 ** torch.arange(12).double())
    assert decay.rank == 1
    assert_close(decay.moduli, torch.tensor([0.5]).double())
    with pytest.raises(ValueError, match="have a rank below half its lags"):
        theorems.trigonometric_factors(torch.randn(12, generator=torch.Generator().manual_seed(0)).double())


@problems
@given(seed=SEED, length=st.integers(2, 40))
def test_maximum_entropy_recency(seed, length):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(3, length, generator=generator, dtype=torch.float64) ** 4 + 1e-9
    distribution = weights / weights.sum(-1, keepdim=True)
    comparison = theorems.maximum_entropy_recency(distribution)
    assert comparison.holds()
    # The slack is the divergence from the geometric distribution of the same mean.
    for row, slack in zip(distribution, comparison.slack, strict=True):
        mean = float((row * torch.arange(length)).sum())
        geometric = theorems.geometric_log_prior(mean, length)
        assert_close((row * (row.log() - geometric)).sum(), slack, tolerance=1e-10)


def test_the_geometric_distribution_attains_the_entropy_and_is_alibi():
    log_prior = theorems.geometric_log_prior(3.0, 2000)
    distribution = log_prior.exp()
    assert_close((distribution * torch.arange(2000)).sum(), torch.tensor(3.0).double())
    assert_close(theorems.maximum_entropy_recency(distribution).slack, torch.tensor(0.0).double(), tolerance=1e-12)
    slope = log_prior[0] - log_prior[1]
    assert_close(log_prior, log_prior[0] - slope * torch.arange(2000))
    prior = RecencyPrior(1)
    slopes = prior.dense(torch.tensor([5]), torch.arange(6)).detach()[0, 0].diff()
    assert_close(slopes, slopes[:1].expand(5), tolerance=1e-6)


@problems
@given(seed=SEED, queries=st.integers(1, 9), keys=st.integers(2, 9), constant=st.booleans())
def test_key_only_minimality(seed, queries, keys, constant):
    default = torch.randn(keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    comparison = theorems.key_only_minimality(torch.full_like(default, 2.5) if constant else default, queries)
    assert comparison.holds()
    assert float(comparison.left) == (0.0 if constant else 1.0)


def test_a_sink_prior_occupies_one_lane():
    assert SinkPrior(1).num_lanes(torch.float64) == 1


@problems
@given(seed=SEED, epsilon=EPSILON, masked=st.booleans())
def test_advantage_and_fisher(seed, epsilon, masked):
    score, log_prior = drawn(seed, masked=masked)
    value, upstream = drawn(seed + 1, sizes=(6, 3))[0], drawn(seed + 2, sizes=(4, 3))[0]
    assert theorems.advantage_identity(score, value, upstream, log_prior, epsilon=epsilon).holds(1e-11)
    fisher = theorems.fisher_identity(score, log_prior, epsilon=epsilon)
    assert fisher.holds(1e-11)
    assert float(torch.linalg.eigvalsh(fisher.right).min()) >= -1e-12
    assert_close(fisher.right.sum(-1), torch.zeros(4, 6, dtype=torch.float64), tolerance=1e-11)


def test_a_broken_statement_does_not_hold():
    one, two = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.9])
    assert not theorems.Comparison("false", one, two, "<=").holds()
    assert not theorems.Comparison("false", one, one + 1e-3, "==").holds()
    assert "slack at least" in str(theorems.Comparison("false", one, two, "<="))


@pytest.mark.parametrize("relation", ["<=", "=="])
def test_infinite_sides_hide_nothing(relation):
    infinite, zero = torch.tensor([math.inf], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    same = theorems.Comparison("infinity", infinite, infinite, relation)
    assert same.holds()
    assert float(same.slack) == 0.0
    assert not theorems.Comparison("infinity is zero", infinite, zero, relation).holds()
    assert not theorems.Comparison("no number", infinite * 0, zero, relation).holds()


@pytest.mark.parametrize("sink", [0, 2])
def test_a_sink_without_competitors_has_an_infinite_margin_in_both_sides(sink):
    log_prior = torch.full((2, 3), -math.inf, dtype=torch.float64)
    log_prior[:, sink] = 0.0
    margin = theorems.sink_margin(torch.zeros(2, 3, dtype=torch.float64), log_prior, sink=sink)
    assert margin.holds()
    assert (margin.left == math.inf).all()
    assert (margin.prior == math.inf).all()
    assert (margin.runner_up != sink).all()


def test_statements_hold_to_the_rounding_of_their_dtype():
    score, log_prior = (tensor.float() for tensor in drawn(3))
    value, upstream = drawn(4, sizes=(6, 3))[0].float(), drawn(5, sizes=(4, 3))[0].float()
    assert theorems.advantage_identity(score, value, upstream, log_prior).holds()
    assert theorems.fisher_identity(score, log_prior).holds()
    one = torch.ones(1)
    assert not theorems.Comparison("off by 1e-4", one, one + 1e-4, "==").holds()
    assert not theorems.Comparison("off by 1e-11", one.double(), one.double() + 1e-11, "==").holds()


def test_the_advantage_of_one_score_under_many_priors():
    score, _ = drawn(6)
    log_prior = drawn(7, sizes=(2, 4, 6))[0]
    value, upstream = drawn(8, sizes=(6, 3))[0], drawn(9, sizes=(4, 3))[0]
    comparison = theorems.advantage_identity(score, value, upstream, log_prior)
    assert comparison.left.shape == (2, 4, 6)
    assert comparison.holds()


def test_long_lags_and_large_values_break_no_bound():
    distribution = theorems.geometric_log_prior(1e5, 4_000_000).exp()
    assert theorems.maximum_entropy_recency(distribution / distribution.sum()).holds()
    score, shift = drawn(10)[0], torch.full((6, 3), 1e-3, dtype=torch.float64)
    shift[0] = 0
    value = 1e8 * drawn(11, sizes=(6, 3))[0]
    assert theorems.value_perturbation(score, value, shift).holds()


BAD = [
    (lambda: theorems.fisher_identity(torch.zeros(2, 3, 4)), r"score must have shape \(any, any\)"),
    (lambda: theorems.advantage_identity(torch.zeros(2, 3), torch.zeros(4, 1), torch.zeros(2, 1)), "value must have"),
    (lambda: theorems.advantage_identity(torch.zeros(2, 3), torch.zeros(3, 1), torch.zeros(2, 2)), "width of value"),
    (lambda: theorems.value_perturbation(torch.zeros(1, 2), torch.zeros(2, 1), torch.zeros(3, 1)), "perturbation must"),
    (lambda: theorems.sink_margin(torch.zeros(2, 1)), "score must have at least two keys"),
    (lambda: theorems.sink_margin(torch.zeros(2, 3), sink=3), "sink must be below 3"),
    (lambda: theorems.sink_margin(torch.zeros(1, 2), torch.tensor([[-math.inf, 0.0]])), "sink must be admissible"),
    (lambda: theorems.value_perturbation(torch.zeros(1, 2), torch.zeros(2, 1), torch.ones(2, 1)), "be zero at the"),
    (lambda: theorems.maximum_entropy_recency(torch.tensor([0.5, 0.6])), "lag_distribution must sum to one"),
    (lambda: theorems.maximum_entropy_recency(torch.tensor([1.0, 0.0])), "have a positive mean lag"),
    (lambda: theorems.key_only_minimality(torch.zeros(2, 2), 3), r"default must have shape \(any\)"),
    (lambda: theorems.trigonometric_factors(torch.zeros(2)), "hold at least three lags"),
    (lambda: theorems.geometric_log_prior(0.0, 3), "mean_lag must be positive"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("size", [200.0, 600.0])
def test_large_log_priors_in_float32_raise_no_false_alarm(size):
    generator = torch.Generator().manual_seed(0)
    score = 3 * torch.randn(300, 4, 6, generator=generator)
    log_prior = size * torch.randn(300, 4, 6, generator=generator)
    value, upstream = torch.randn(300, 6, 2, generator=generator), torch.randn(300, 4, 2, generator=generator)
    shift = torch.randn(300, 6, 2, generator=generator)
    shift[:, 0] = 0
    for found in (
        theorems.collapse_to_the_prior(score, log_prior),
        theorems.sink_margin(score, log_prior),
        theorems.context_sensitivity(score, log_prior),
        theorems.value_perturbation(score, value, shift, log_prior),
        theorems.advantage_identity(score, value, upstream, log_prior),
        theorems.fisher_identity(score[0], log_prior[0]),
    ):
        assert found.holds(), found


def test_small_numbers_get_no_large_tolerance():
    one = torch.tensor(1.0)
    assert not theorems.Comparison("false", one, one + 1e-4, "==", magnitude=2.0).holds()
    assert theorems.Comparison("rounding", one, one + 1e-4, "==", magnitude=1e3).holds()
