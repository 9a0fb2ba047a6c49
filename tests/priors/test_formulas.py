"""Each prior against its formula, rewritten independently in float64; starts, ranges and numbers known from papers."""

import math

import numpy as np
import pytest
import torch
from priors.cases import HEADS, off_neutral
from tolerances import TOLERANCE, assert_close, centre_rows, relative_error

from eotattn.priors import (
    ClassTokenPrior,
    DensePrior,
    ForgettingPrior,
    FourierPrior,
    GridPrior,
    HeadsPrior,
    JoinedPrior,
    RecencyPrior,
    RelativeBiasPrior,
    ScaledPrior,
    SinkPrior,
    SumPrior,
    alibi_slopes,
    goat_prior,
    grid_positions,
    num_local_heads,
)

QUERIES, KEYS = torch.arange(3, 8), torch.arange(7)


def exact(prior, queries=QUERIES, keys=KEYS):
    return prior.dense(queries, keys, dtype=torch.float64).detach()


def recency_lanes(**options):
    return RecencyPrior(4).lanes(QUERIES, KEYS, dtype=torch.float32, **options)


def geometric(count, shortest, longest):
    """Angular frequencies whose periods run geometrically from shortest to longest."""
    return 2 * np.pi / np.geomspace(shortest, longest, count)


def fourier_oracle(even, odd, frequencies, lag):
    """kappa(t) as the real part of sum_r (even - i odd) exp(i omega t)."""
    weights = even.detach().double().numpy() - 1j * odd.detach().double().numpy()
    waves = np.exp(1j * np.asarray(lag)[..., None] * frequencies)
    return torch.from_numpy(np.einsum("hr,...r->h...", weights, waves).real)


def lags(queries=QUERIES, keys=KEYS):
    return np.asarray(queries)[:, None].astype(np.float64) - np.asarray(keys)[None].astype(np.float64)


def u_oracle(prior, key):
    """u(j) of a SinkPrior, term by term."""
    key = np.asarray(key, dtype=np.float64)
    first, growth = prior.first_token.detach().double().numpy(), prior.growth.detach().double().numpy()
    u = first[:, None] * (key == 0)[None] + growth[:, None] * (np.log(1 + key) / np.log(1 + prior.length_scale))[None]
    if prior.frequencies:
        waves = geometric(len(prior.frequencies), prior.min_period, 2 * np.pi * prior.length_scale)
        u = u + fourier_oracle(prior.even, prior.odd, waves, key).numpy()
    return torch.from_numpy(u)


# Fourier ------------------------------------------------------------------------------------------------------------


def test_fourier_is_the_papers_formula():
    prior = off_neutral(FourierPrior(HEADS, 5, 3.0, 700.0))
    expected = fourier_oracle(prior.even, prior.odd, geometric(5, 3.0, 700.0), lags())
    assert_close(exact(prior), expected)


@pytest.mark.parametrize("position", [131_072, 1_000_003])
def test_fourier_phases_are_exact_at_long_positions(position):
    """A float32 phase at 131 072 is off by 5e-4; both forms must not be."""
    prior = off_neutral(FourierPrior(HEADS, 5, 2 * math.pi, 700.0))
    queries, keys = QUERIES + position, torch.cat([KEYS + position, KEYS])
    expected = fourier_oracle(prior.even, prior.odd, geometric(5, 2 * math.pi, 700.0), lags(queries, keys))
    # float64 itself rounds a phase of 1e6 radians to 1e-10
    assert_close(exact(prior, queries, keys), expected, tolerance=5e-10)
    assert_close(prior.dense(queries, keys), expected.float())
    lanes = prior.lanes(queries, keys, dtype=torch.float32).dense()
    assert_close(centre_rows(lanes), centre_rows(expected.float()))


def test_fourier_has_one_frequency_at_the_shortest_period():
    frequencies = FourierPrior(HEADS, 1, 8.0, 512.0).frequencies
    assert frequencies == (2 * math.pi / 8,)


def test_fourier_can_be_negative_and_directional():
    prior = FourierPrior(1, 2, 4.0, 64.0)
    with torch.no_grad():
        prior.even.copy_(torch.tensor([[-1.0, 0.0]]))
        prior.odd.copy_(torch.tensor([[0.0, 2.0]]))
    forward, same, backward = exact(prior, torch.tensor([8, 7, 6]), torch.tensor([7]))[0, :, 0]
    assert same == -1
    assert abs(forward + backward) < 1e-12  # cos vanishes a quarter period away; the odd part changes sign
    assert forward > 0.19  # 2 sin(2 pi / 64)


# Recency ------------------------------------------------------------------------------------------------------------

#: From the definition: the sequence of a power of two, then every other slope of the next power, from its first.
KNOWN_SLOPES = {
    8: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256],
    12: [
        *(0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625),
        *(0.7071067811865476, 0.35355339059327379, 0.17677669529663689, 0.08838834764831845),
    ],
    16: [
        *(0.7071067811865476, 0.5, 0.35355339059327379, 0.25, 0.17677669529663689, 0.125, 0.08838834764831845),
        *(0.0625, 0.04419417382415922, 0.03125, 0.02209708691207961, 0.015625, 0.011048543456039806, 0.0078125),
        *(0.005524271728019903, 0.00390625),
    ],
}


@pytest.mark.parametrize("heads", KNOWN_SLOPES)
def test_alibi_slopes_are_the_published_ones(heads):
    expected = torch.tensor(KNOWN_SLOPES[heads], dtype=torch.float64)
    assert_close(torch.tensor(alibi_slopes(heads), dtype=torch.float64), expected)
    assert_close(RecencyPrior(heads).slopes.detach(), expected)


@pytest.mark.parametrize("heads", [1, 3, 5, 6, 7, 12, 20, 33])
def test_alibi_slopes_are_distinct_and_between_zero_and_one(heads):
    slopes = alibi_slopes(heads)
    assert len(slopes) == len(set(slopes)) == heads
    assert 0 < min(slopes) <= max(slopes) < 1


def test_recency_is_minus_slope_times_lag():
    prior = RecencyPrior(12)
    slopes = torch.tensor(KNOWN_SLOPES[12], dtype=torch.float64)[:, None, None]
    expected = -slopes * torch.from_numpy(lags())
    assert_close(exact(prior), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_recency_lanes_are_the_recency_bias_up_to_a_row_constant(dtype):
    """The key-linear term m j equals -m (i - j) after softmax, which is all that a causal mask leaves."""
    prior, queries = RecencyPrior(8), torch.arange(300, 309)
    keys = torch.arange(309)
    slopes = torch.tensor(KNOWN_SLOPES[8], dtype=torch.float64)[:, None, None]
    expected = centre_rows(-slopes * torch.from_numpy(lags(queries, keys)))
    lanes = prior.lanes(queries, keys, dtype=dtype).dense().double()
    assert_close(centre_rows(lanes), expected, tolerance=1e-12 if dtype == torch.float64 else 1e-5)


def test_recency_is_never_negative_and_can_come_back():
    prior, unit = RecencyPrior(3), torch.tensor(alibi_slopes(3), dtype=torch.float64)
    with torch.no_grad():
        prior.strength.copy_(torch.tensor([-0.5, 0.0, 2.0]))
    assert_close(prior.slopes.detach(), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64) * unit)
    (gradient,) = torch.autograd.grad(prior.slopes.sum(), prior.strength)
    assert_close(gradient, torch.tensor([-1.0, 1.0, 1.0]) * unit)


def test_mean_lags_are_the_mean_lags_of_the_prior():
    """Of the distribution that attention without signal returns to, over more lags than matter."""
    wanted = [0.5, 3.0, 40.0]
    prior = RecencyPrior(3, mean_lags=wanted)
    query, keys = torch.tensor([6000]), torch.arange(6001)
    weights = prior.dense(query, keys, dtype=torch.float64).softmax(-1)[:, 0]
    means = (weights * (query - keys)).sum(-1).detach()
    assert_close(means, torch.tensor(wanted, dtype=torch.float64), tolerance=1e-10)


# Sink ---------------------------------------------------------------------------------------------------------------


def test_u_is_its_formula():
    prior = off_neutral(SinkPrior(HEADS, 3, length_scale=40.0, min_period=5.0))
    expected = u_oracle(prior, KEYS)[:, None].expand(-1, QUERIES.shape[0], -1)
    assert_close(exact(prior), expected)
    assert_close(prior.key_only(KEYS, dtype=torch.float64), expected[:, 0])
    assert_close(prior.key_only(KEYS), expected[:, 0].float())


def test_u_does_not_depend_on_the_current_length():
    prior = off_neutral(SinkPrior(HEADS, 3, length_scale=40.0))
    long = prior.key_only(torch.arange(500), dtype=torch.float64)
    for length in (1, 7, 41, 333):
        torch.testing.assert_close(prior.key_only(torch.arange(length), dtype=torch.float64), long[:, :length])
    torch.testing.assert_close(prior.key_only(torch.arange(41, 45), dtype=torch.float64), long[:, 41:45])


def test_u_is_constant_from_its_horizon_on_and_the_same_before():
    prior = off_neutral(SinkPrior(HEADS, 3, length_scale=40.0, horizon=40.0))
    free = off_neutral(SinkPrior(HEADS, 3, length_scale=40.0))
    u = prior.key_only(torch.arange(500), dtype=torch.float64)
    assert_close(u[:, :41], free.key_only(torch.arange(41), dtype=torch.float64))
    assert_close(u[:, 40:], u[:, 40:41].expand(-1, 460))
    assert bool((u[:, :40].diff(dim=-1) != 0).all())


def test_growth_reaches_one_at_the_length_scale():
    prior = SinkPrior(2, 0, length_scale=40.0)
    torch.nn.init.ones_(prior.growth)
    assert_close(prior.key_only(torch.tensor([40]), dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64))


def test_the_first_token_term_touches_position_zero_alone():
    prior = SinkPrior(2, 2)
    with torch.no_grad():
        prior.first_token.copy_(torch.tensor([3.0, -1.0]))
    u = prior.key_only(torch.tensor([5, 0, 1, -1]))
    torch.testing.assert_close(u.detach(), torch.tensor([[0.0, 3.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0]]))


# Table and given ----------------------------------------------------------------------------------------------------


def test_table_is_looked_up_by_lag_and_flat_beyond_its_range():
    prior = off_neutral(RelativeBiasPrior(HEADS, max_lag=2))
    dense, table = exact(prior), prior.table.detach().double()
    for q, query in enumerate(QUERIES.tolist()):
        for k, key in enumerate(KEYS.tolist()):
            entry = min(max(query - key, -2), 2) + 2
            torch.testing.assert_close(dense[:, q, k], table[:, entry])
    far = exact(prior, torch.tensor([1000, 0]), torch.tensor([0, 1000]))
    torch.testing.assert_close(far[:, 0, 0], table[:, 4])
    torch.testing.assert_close(far[:, 1, 1], table[:, 0])


def test_a_given_matrix_is_looked_up_by_position():
    matrix = torch.randn(HEADS, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    queries, keys = torch.tensor([8, 0, 3]), torch.tensor([10, 2])
    assert torch.equal(exact(DensePrior(matrix), queries, keys), matrix[:, queries][:, :, keys])


def test_a_given_matrix_is_copied():
    matrix = torch.zeros(1, 2, 2)
    prior = DensePrior(matrix)
    matrix.fill_(7.0)
    assert exact(prior, torch.arange(2), torch.arange(2)).abs().max() == 0


# Grid ---------------------------------------------------------------------------------------------------------------


def test_grid_is_the_sum_over_both_axes():
    rows, columns = (
        off_neutral(FourierPrior(HEADS, 3, 4.0, 30.0)),
        off_neutral(FourierPrior(HEADS, 4, 3.0, 9.0), seed=1),
    )
    cells = grid_positions(3, 5)
    assert cells.tolist() == [[r, c] for r in range(3) for c in range(5)]
    row, column = cells[:, 0], cells[:, 1]
    expected = fourier_oracle(rows.even, rows.odd, geometric(3, 4.0, 30.0), lags(row, row))
    expected = expected + fourier_oracle(columns.even, columns.odd, geometric(4, 3.0, 9.0), lags(column, column))
    assert_close(exact(GridPrior(rows, columns), cells, cells), expected)


def test_both_axes_have_the_full_range_of_frequencies():
    """Swapping the roles of rows and columns, in positions and in priors, changes nothing."""
    first, second = (
        off_neutral(FourierPrior(HEADS, 3, 4.0, 30.0)),
        off_neutral(FourierPrior(HEADS, 3, 4.0, 30.0), seed=1),
    )
    cells = grid_positions(4, 5)
    swapped = exact(GridPrior(second, first), cells.flip(-1), cells.flip(-1))
    torch.testing.assert_close(swapped, exact(GridPrior(first, second), cells, cells))
    torch.testing.assert_close(first.frequencies, second.frequencies)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_class_token_has_zero_relative_lanes(dtype):
    """Also with a directional axis, whose lanes leave out a term of the row that class tokens must not lack."""
    prior = GridPrior(off_neutral(FourierPrior(HEADS, 3, 4.0, 30.0)), RecencyPrior(HEADS))
    cells = grid_positions(3, 4, class_token=True)
    lanes, dense = prior.lanes(cells, cells, dtype=dtype), prior.dense(cells, cells)
    assert not lanes.query[..., 0, :].any()
    assert not lanes.key[..., 0, :].any()
    assert not dense[:, 0].any()
    assert not dense[:, :, 0].any()
    assert dense[:, 1:, 1:].any()


def test_the_class_token_prior_is_a_weight_on_the_class_key():
    prior = off_neutral(ClassTokenPrior(HEADS))
    cells = grid_positions(2, 3, class_token=True)
    expected = torch.zeros(HEADS, 7, 7, dtype=torch.float64)
    expected[:, :, 0] = prior.class_token.detach().double()[:, None]
    assert_close(exact(prior, cells, cells), expected)


# The paper's sum ----------------------------------------------------------------------------------------------------


def goat_oracle(prior, queries, keys, *, num_frequencies, length_scale):
    """K_ij = kappa(i - j) + u(j) and a slope, from the paper's equations."""
    fourier, recency, sink = prior.parts
    # the paper's frequencies: base^(-r / (R - 1)) with base 10 000
    frequencies = 10_000.0 ** (-np.arange(num_frequencies) / (num_frequencies - 1))
    kappa = fourier_oracle(fourier.even, fourier.odd, frequencies, lags(queries, keys))
    strength = recency.strength.detach().double().abs()
    slopes = strength * torch.tensor([2.0 ** (-4), 2.0 ** (-8), 2.0 ** (-2)], dtype=torch.float64)
    assert sink.length_scale == length_scale
    u = u_oracle(sink, keys)[:, None]
    return kappa + u - slopes[:, None, None] * torch.from_numpy(lags(queries, keys))


def test_goat_prior_is_the_papers_sum():
    prior = off_neutral(goat_prior(HEADS, form="paper", num_frequencies=4, length_scale=50.0))
    expected = goat_oracle(prior, QUERIES, KEYS, num_frequencies=4, length_scale=50.0)
    assert_close(exact(prior), expected)
    lanes = prior.lanes(QUERIES, KEYS, dtype=torch.float64).dense()
    assert_close(centre_rows(lanes), centre_rows(expected))
    assert prior.num_lanes() == 2 * 4 + 3


# Starts -------------------------------------------------------------------------------------------------------------

NEUTRAL = {
    "fourier": lambda: FourierPrior(HEADS, 5),
    "recency": lambda: RecencyPrior(HEADS, "neutral"),
    "sink": lambda: SinkPrior(HEADS, 3, length_scale=40.0),
    "table": lambda: RelativeBiasPrior(HEADS, max_lag=7),
    "grid": lambda: GridPrior(FourierPrior(HEADS, 3, 4.0, 9.0), FourierPrior(HEADS, 3, 4.0, 9.0)),
    "class token": lambda: ClassTokenPrior(HEADS),
    "goat": lambda: goat_prior(HEADS, num_frequencies=3, init="neutral"),
    "goat of the paper": lambda: goat_prior(HEADS, form="paper", num_frequencies=3, init="neutral"),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_start_is_exactly_zero_and_every_number_can_move(name):
    prior = NEUTRAL[name]()
    cells = grid_positions(3, 4, class_token=True) if prior.num_coordinates == 2 else torch.arange(9)
    for dtype in (torch.float32, torch.float64):
        assert not prior.dense(cells, cells, dtype=dtype).any()
    if prior.has_lanes:
        assert not prior.lanes(cells, cells, dtype=torch.bfloat16).dense().any()
    weight = centre_rows(torch.randn(HEADS, len(cells), len(cells), generator=torch.Generator().manual_seed(3)))
    reached = [torch.zeros_like(parameter) for parameter in prior.parameters()]
    for sign in (1, -1):  # a slope at zero can only rise: one of the two directions is blocked for it
        loss = (sign * weight * prior.dense(cells, cells)).sum()
        gradients = torch.autograd.grad(loss, list(prior.parameters()))
        reached = [seen + gradient.abs() for seen, gradient in zip(reached, gradients, strict=True)]
    for (parameter, _), size in zip(prior.named_parameters(), reached, strict=True):
        if name == "table":
            size = size[:, 1:-1]  # lags of 9 tokens run to 8; the entries at the ends collect 7 and 8
        assert (size > 0).all(), parameter


def test_alibi_seeded_start_is_alibi():
    prior = goat_prior(8, form="paper")
    assert_close(exact(prior), exact(RecencyPrior(8)))


def test_the_split_form_has_local_and_global_heads():
    """From its description, head by head: mean lags 2, 16, 128 and 64 training lengths; waves of periods 2.5 and 64."""
    prior = off_neutral(goat_prior(4, num_frequencies=2, length_scale=256.0))
    waves, recency, sink = prior.parts
    queries, keys = torch.arange(690, 700), torch.arange(0, 700, 7)
    lag = torch.from_numpy(lags(queries, keys))
    mean_lags, weaker = (2.0, 16.0, 128.0, 64 * 256.0), (1.0, 1.0, 1.0, 1 / 128)
    angles = lag[..., None] * 2 * math.pi / torch.tensor([2.5, 64.0], dtype=torch.float64)
    fourier = waves.prior
    key = keys.clamp(max=256).double()
    for h in range(4):
        even, odd = fourier.even[h].detach().double(), fourier.odd[h].detach().double()
        relative = weaker[h] * (angles.cos() * even + angles.sin() * odd).sum(-1)
        slope = recency.strength[h].abs().item() * math.log(1 + 1 / mean_lags[h])
        first, growth = sink.first_token[h].item(), sink.growth[h].item()
        u = first * (keys == 0) + growth * torch.log1p(key) / math.log(257)
        expected = relative - slope * lag + u
        assert_close(prior.dense(queries, keys, dtype=torch.float64)[h].detach(), expected, tolerance=1e-4)
    assert num_local_heads(4) == 3


# Algebra ------------------------------------------------------------------------------------------------------------


def test_a_multiple_scales_every_part_and_is_a_constant_of_its_constructor():
    prior = off_neutral(goat_prior(HEADS, num_frequencies=3))
    scaled = 0.25 * prior
    for part in prior.parts:  # the Fourier part too
        assert exact(part).abs().max() > 0.01
        assert_close(exact(0.25 * part), 0.25 * exact(part))
    assert_close(exact(scaled), 0.25 * exact(prior))
    assert {name.removeprefix("parts.0.") for name in scaled.state_dict()} == set(prior.state_dict())
    loaded = 4.0 * off_neutral(goat_prior(HEADS, num_frequencies=3), seed=9)
    loaded.load_state_dict(scaled.state_dict())  # the checkpoint holds the prior, the code its factor
    assert_close(exact(loaded), 4.0 * exact(prior))


def test_a_multiple_shows_its_factors():
    prior = RecencyPrior(2)
    for scaled, words in ((2 * prior, "factor=2.0"), (prior * (1.0, 0.0), "factor=(1.0, 0.0)")):
        assert f"num_heads=2, {words}" in repr(scaled)
    assert "factor=(2,)" in repr(ScaledPrior(prior, 0.5, learnable=True)), "what is learned is shown by its shape"


def test_a_multiple_a_head_scales_head_by_head_and_zero_removes_the_prior():
    prior = off_neutral(goat_prior(HEADS, num_frequencies=3))
    scaled = prior * (2.0, -0.5, 0.0)
    assert_close(exact(scaled), torch.tensor([2.0, -0.5, 0.0]).double()[:, None, None] * exact(prior))
    assert float(exact(scaled)[2].abs().max()) == 0.0
    lanes = scaled.lanes(QUERIES, KEYS, dtype=torch.float64).dense()
    assert_close(centre_rows(lanes), centre_rows(exact(scaled)))


def test_sums_quotients_and_signs_are_those_of_numbers():
    a, b = off_neutral(SinkPrior(HEADS, 3)), off_neutral(FourierPrior(HEADS, 3))
    assert_close(exact(sum([a, b])), exact(a) + exact(b))
    assert_close(exact(sum([a, a])), 2 * exact(a))
    assert_close(exact(-a), -exact(a))
    assert_close(exact(a / 2), 0.5 * exact(a))
    assert_close(exact(-(a + b) / 4), -0.25 * (exact(a) + exact(b)))
    assert sum([a]) is a


def test_a_learnable_multiple_has_the_gradient_of_its_factors():
    prior = off_neutral(FourierPrior(HEADS, 3))
    scaled = ScaledPrior(prior, (0.5, -1.0, 0.0), learnable=True)
    assert scaled.state_dict()["factor"].tolist() == [0.5, -1.0, 0.0]
    assert_close(exact(scaled), torch.tensor([0.5, -1.0, 0.0]).double()[:, None, None] * exact(prior))
    weight = centre_rows(torch.randn(exact(prior).shape, generator=torch.Generator().manual_seed(4)).double())
    expected = (weight * exact(prior)).sum((-2, -1))  # d/df of f * prior, head by head
    forms = {
        "dense": lambda: scaled.dense(QUERIES, KEYS, dtype=torch.float64),
        "lanes": lambda: scaled.lanes(QUERIES, KEYS, dtype=torch.float64).dense(),
    }
    for form, compute in forms.items():
        (gradient,) = torch.autograd.grad((weight * compute()).sum(), scaled.factor)
        assert relative_error(gradient, expected) <= TOLERANCE[torch.float32], form
    with torch.no_grad():
        scaled.factor.fill_(7.0)
    scaled.reset_parameters()
    assert scaled.factor.tolist() == [0.5, -1.0, 0.0]


@pytest.mark.parametrize("factor", [0.0, -2.0, (1.0, 0.0, -1.0)])
def test_a_multiple_keeps_inadmissible_keys_inadmissible(factor):
    matrix = torch.randn(HEADS, 5, 7, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(5, 7, generator=torch.Generator().manual_seed(2)) > 0.5
    scaled = exact(DensePrior(matrix.masked_fill(hidden, -math.inf)) * factor, torch.arange(5), torch.arange(7))
    assert torch.equal(scaled == -math.inf, hidden.expand_as(scaled))
    numbers = torch.tensor([factor] * HEADS if isinstance(factor, float) else factor)
    assert_close(scaled[:, ~hidden], (numbers[:, None, None] * matrix)[:, ~hidden].double())


def test_a_learnable_multiple_has_a_gradient_beside_inadmissible_keys():
    matrix = torch.tensor([[[0.0, 1.0, -torch.inf], [2.0, -torch.inf, 3.0]]])
    scaled = ScaledPrior(DensePrior(matrix), 0.5, learnable=True)
    dense = scaled.dense(torch.arange(2), torch.arange(3))
    dense.exp().sum().backward()
    expected = sum(entry * math.exp(entry / 2) for entry in (0.0, 1.0, 2.0, 3.0))
    assert scaled.factor.grad.item() == pytest.approx(expected, rel=1e-5)


def test_a_head_taken_several_times_is_equal_in_all_and_learns_from_all():
    one = off_neutral(goat_prior(1, num_frequencies=3))
    shared = HeadsPrior(one, [0] * 4)
    assert torch.equal(exact(shared), exact(one).expand(4, -1, -1))
    exact_sum = shared.dense(QUERIES, KEYS, dtype=torch.float64).sum()
    (gradient,) = torch.autograd.grad(exact_sum, one.parts[2].growth)
    (alone,) = torch.autograd.grad(one.dense(QUERIES, KEYS, dtype=torch.float64).sum(), one.parts[2].growth)
    assert_close(gradient, 4 * alone, tolerance=1e-5)


def test_chosen_heads_are_those_heads_in_every_form():
    prior = off_neutral(goat_prior(5, num_frequencies=2, length_scale=30.0))
    chosen = prior.heads([4, 0, 4])
    assert torch.equal(exact(chosen), exact(prior)[[4, 0, 4]])
    lanes = chosen.lanes(QUERIES, KEYS, dtype=torch.float64).dense()
    assert_close(centre_rows(lanes), centre_rows(exact(prior)[[4, 0, 4]]))


def test_joined_priors_are_their_heads_one_after_the_other():
    parts = off_neutral(RecencyPrior(1)), off_neutral(SinkPrior(2, 3)), off_neutral(RelativeBiasPrior(1, 3))
    assert_close(exact(JoinedPrior(*parts)), torch.cat([exact(part) for part in parts]))
    linear = JoinedPrior(*parts[:2])
    lanes = linear.lanes(QUERIES, KEYS, dtype=torch.float64).dense()
    assert_close(centre_rows(lanes), centre_rows(exact(linear)))


def test_sums_are_flat_and_keep_their_order():
    a, b, c = RecencyPrior(2), SinkPrior(2), FourierPrior(2)
    assert [*((a + b) + c).parts] == [*(a + (b + c)).parts] == [*SumPrior(a, b, c).parts] == [a, b, c]
    assert [*SumPrior(a).parts] == [a]


def test_a_part_of_a_sum_can_be_frozen():
    prior = goat_prior(HEADS)
    prior.parts[1].freeze()
    trainable = [name for name, parameter in prior.named_parameters() if parameter.requires_grad]
    assert trainable
    assert not any(name.startswith("parts.1.") for name in trainable)


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: FourierPrior(0), ValueError, "FourierPrior: num_heads must be at least 1; got 0"),
        (lambda: FourierPrior(2.0), TypeError, "FourierPrior: num_heads must be an integer; got 2.0"),
        (lambda: FourierPrior(True), TypeError, "FourierPrior: num_heads must be an integer; got True"),
        (lambda: FourierPrior(2, 0), ValueError, "num_frequencies must be at least 1"),
        (lambda: FourierPrior(2, 3, 2.0), ValueError, "min_period must exceed 2 tokens"),
        (lambda: FourierPrior(2, 3, 4.0, math.inf), ValueError, "max_period must be positive and finite"),
        (lambda: FourierPrior(2, 3, math.nan), ValueError, "min_period must be positive and finite"),
        (lambda: FourierPrior(2, 3, 9.0, 4.0), ValueError, "max_period must be at least min_period"),
        (lambda: FourierPrior(2, periods=3), TypeError, "unexpected keyword"),
        (lambda: RecencyPrior(2, "zero"), ValueError, "init must be one of 'alibi', 'neutral'; got 'zero'"),
        (lambda: RecencyPrior(2, mean_lags=[3.0]), ValueError, r"mean_lags must hold 2 positive numbers; got \[3.0\]"),
        (lambda: RecencyPrior(2, mean_lags=[3.0, math.inf]), ValueError, "mean_lags must hold 2 positive numbers"),
        (lambda: RecencyPrior(2, mean_lags=[3.0, 0.0]), ValueError, "mean_lags must hold 2 positive numbers"),
        (lambda: SinkPrior(2, horizon=0.0), ValueError, "horizon must be positive; got 0.0"),
        (lambda: SinkPrior(2, -1), ValueError, "num_frequencies must be at least 0"),
        (lambda: SinkPrior(2, length_scale=0.0), ValueError, "length_scale must be positive"),
        (lambda: SinkPrior(2, length_scale=1.0, min_period=9.0), ValueError, "min_period must be at most 2 pi"),
        (lambda: RelativeBiasPrior(2, -1), ValueError, "max_lag must be at least 0"),
        (lambda: RelativeBiasPrior(2, 1.5), TypeError, "max_lag must be an integer"),
        (lambda: DensePrior(torch.zeros(3, 3)), ValueError, r"log_prior must have shape \(H, N, M\)"),
        (lambda: DensePrior(torch.zeros(2, 0, 3)), ValueError, r"log_prior must have shape \(H, N, M\)"),
        (
            lambda: DensePrior(torch.zeros(1, 3, 3, dtype=torch.int64)),
            TypeError,
            "log_prior must have a floating dtype",
        ),
        (lambda: DensePrior([[[0.0]]]), TypeError, "log_prior must be a tensor"),
        (lambda: DensePrior(torch.full((1, 2, 2), math.nan)), ValueError, r"hold no NaN and no \+inf; got '4 such"),
        (lambda: DensePrior(torch.full((1, 2, 2), math.inf)), ValueError, r"hold no NaN and no \+inf"),
        (lambda: GridPrior(RecencyPrior(2), RecencyPrior(3)), ValueError, "GridPrior: axes must agree in num_heads"),
        (lambda: GridPrior(ClassTokenPrior(2), RecencyPrior(2)), ValueError, "axes must act on one coordinate"),
        (lambda: GridPrior(ForgettingPrior(4, 2), RecencyPrior(2)), ValueError, "axes must read positions alone"),
        (lambda: GridPrior(RecencyPrior(2)), ValueError, "GridPrior: axes must be two or more priors"),
        (lambda: RecencyPrior(2) + RecencyPrior(3), ValueError, "parts must agree in num_heads"),
        (lambda: RecencyPrior(2) + ClassTokenPrior(2), ValueError, "parts must agree in num_coordinates"),
        (lambda: RecencyPrior(2) + 1.0, TypeError, "unsupported operand"),
        (lambda: SumPrior(), ValueError, "parts must hold at least one prior"),
        (lambda: math.nan * RecencyPrior(2), ValueError, "factor must be a finite number"),
        (lambda: HeadsPrior(3.0, [0]), TypeError, "HeadsPrior: prior must be a LogPrior; got 3.0"),
        (lambda: HeadsPrior(RecencyPrior(2), [2]), ValueError, r"HeadsPrior: chosen must name heads from 0 to 1"),
        (lambda: HeadsPrior(RecencyPrior(2), []), ValueError, r"HeadsPrior: chosen must name heads from 0 to 1"),
        (lambda: JoinedPrior(), ValueError, "JoinedPrior: parts must hold at least one prior"),
        (lambda: JoinedPrior(RecencyPrior(2), ClassTokenPrior(2)), ValueError, "parts must agree in num_coordinates"),
        (lambda: RecencyPrior(2) / 0, ValueError, "RecencyPrior: divisor must not be zero"),
        (lambda: 1 / RecencyPrior(2), TypeError, "unsupported operand"),
        (lambda: sum([RecencyPrior(2), 1.0]), TypeError, "unsupported operand"),
        (lambda: RecencyPrior(2) * torch.ones(2), TypeError, None),
        (lambda: RecencyPrior(2) * (1.0,), ValueError, r"factor must be a finite number, or 2 of them; got \(1.0,\)"),
        (lambda: RecencyPrior(2) * (1.0, math.inf), ValueError, "factor must be a finite number, or 2 of them"),
        (lambda: "2" * RecencyPrior(2), TypeError, None),
        (lambda: grid_positions(0, 3), ValueError, "grid_positions: height must be at least 1"),
        (
            lambda: RelativeBiasPrior(2, 3).lanes(KEYS, KEYS, dtype=torch.float32),
            NotImplementedError,
            "RelativeBiasPrior.*flex",
        ),
        (lambda: RecencyPrior(2).dense(KEYS[:0], KEYS), ValueError, "query_positions must not be empty"),
        (lambda: RecencyPrior(2).dense(KEYS, KEYS[:0]), ValueError, "key_positions must not be empty"),
        (lambda: RecencyPrior(2).dense(KEYS, range(3)), TypeError, "key_positions must be a tensor"),
        (lambda: RecencyPrior(2).dense(KEYS[None, None], KEYS), ValueError, r"query_positions must have shape \(L,\)"),
        (lambda: RecencyPrior(2).dense(KEYS > 2, KEYS), TypeError, "query_positions must hold real numbers"),
        (lambda: ClassTokenPrior(2).dense(KEYS, KEYS), ValueError, r"query_positions must have shape \(L, 2\)"),
        (lambda: ClassTokenPrior(2).score_mod(), TypeError, "query_positions must be a tensor"),
        (
            lambda: RecencyPrior(2).lanes(KEYS, KEYS, dtype=torch.float32, tolerance=0.0),
            ValueError,
            "tolerance must be",
        ),
        (lambda: RecencyPrior(2).lanes(KEYS, KEYS, dtype=torch.int64), TypeError, "dtype must be"),
        (
            lambda: RecencyPrior(4).lanes(KEYS, KEYS, dtype=torch.float32, num_kv_heads=3),
            ValueError,
            "num_kv_heads must",
        ),
        (lambda: RecencyPrior(4).num_lanes(num_kv_heads=3), ValueError, "num_kv_heads must divide"),
        (
            lambda: RecencyPrior(2).lanes(KEYS, KEYS, dtype=torch.float32, query_scale=-1.0),
            ValueError,
            "query_scale must be",
        ),
    ],
)
def test_bad_input(build, error, message):
    with pytest.raises(error, match=message):
        build()
