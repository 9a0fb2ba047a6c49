"""Lanes in the formats of kernels: stated bounds, digits, grouped heads, and the recency prior at full length."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from priors.cases import CASES, HEADS, off_neutral
from tolerances import assert_close, centre_rows

from eotattn.attention import prior_attention
from eotattn.priors import (
    FourierPrior,
    GridPrior,
    RecencyPrior,
    RelativeBiasPrior,
    SinkPrior,
    goat_prior,
    grid_positions,
)
from eotattn.priors.lanes import DIGIT_WEIGHTS, LaneFactors, position_digits

LOW = [torch.bfloat16, torch.float16]


def lane_error(prior, queries, keys, dtype, terms=None):
    """Largest error of the lanes against the float64 truth, the factors' row term added; and the stated bound."""
    lanes = prior.lanes(queries, keys, dtype=dtype, terms=terms)
    truth = prior.dense(queries, keys, dtype=torch.float64)
    factors = prior.factors(queries, keys, dtype=torch.float64)
    row = sum(part.row.unsqueeze(-1) for part in factors if part.row is not None)
    return float((lanes.dense().double() + row - truth).abs().max().detach()), lanes.error_bound


# Bounds -------------------------------------------------------------------------------------------------------------

POSITIONS = st.lists(st.integers(0, 1_000_000), min_size=1, max_size=6).map(torch.tensor)
AMPLITUDES = st.floats(-50, 50, allow_subnormal=False, width=32)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    queries=POSITIONS,
    keys=POSITIONS,
    amplitude=AMPLITUDES,
    other=AMPLITUDES,
    strength=st.floats(0, 3, allow_subnormal=False, width=32),
    dtype=st.sampled_from(LOW),
    part=st.sampled_from(["fourier", "recency", "sink", "goat"]),
)
def test_low_precision_lanes_stay_within_their_bound(queries, keys, amplitude, other, strength, dtype, part):
    prior = goat_prior(HEADS, form="paper", num_frequencies=3, length_scale=300.0)
    fourier, recency, sink = prior.parts
    with torch.no_grad():
        fourier.even.copy_(torch.tensor([amplitude, other, 0.1]).expand(HEADS, 3))
        fourier.odd.copy_(torch.tensor([other, 0.3, amplitude]).expand(HEADS, 3))
        recency.strength.fill_(strength)
        sink.first_token.fill_(other)
        sink.growth.fill_(amplitude)
        sink.even.fill_(other / 3)
    chosen = {"fourier": fourier, "recency": recency, "sink": sink, "goat": prior}[part]
    error, bound = lane_error(chosen, queries, keys, dtype)
    assert error <= bound


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", [name for name, (make, _) in CASES.items() if make().has_lanes])
def test_the_bound_is_not_absurd_and_splitting_pays(name, dtype):
    prior = CASES[name][0]()
    cells = grid_positions(5, 7, class_token=True) if prior.num_coordinates == 2 else torch.arange(601)
    error, bound = lane_error(prior, cells, cells, dtype)
    assert error <= bound
    plain, plain_bound = lane_error(prior, cells, cells, dtype, terms=1)
    assert plain <= plain_bound
    assert bound <= plain_bound / 50
    exactly_representable = name == "class token" and dtype == torch.float16
    assert error <= plain / 5 or exactly_representable


def test_more_terms_mean_smaller_errors():
    prior = off_neutral(FourierPrior(HEADS, 4, 4.0, 512.0), size=2.0)
    cells = torch.arange(300)
    errors = [lane_error(prior, cells, cells, torch.bfloat16, terms=terms)[0] for terms in (1, 2, 3)]
    assert errors[0] > 1e-2
    assert errors[1] < errors[0] / 50
    assert errors[2] < errors[1] / 10
    lanes = [prior.lanes(cells, cells, dtype=torch.bfloat16, terms=terms).num_lanes for terms in (1, 2, 3)]
    assert lanes == [8, 24, 48]


def test_the_bound_would_notice_a_lie():
    """A factor that claims to be exact in bfloat16 and is not breaks its bound."""
    key = torch.arange(300.0)[None, :, None] + 0.1
    lie = LaneFactors(torch.ones(1, 1, 1), key, exact="key")
    query, rounded = lie.split(torch.bfloat16)
    error = (query.float() @ rounded.float().transpose(-1, -2) - key.transpose(-1, -2)).abs().max()
    assert error > 100 * lie.error_bound(torch.bfloat16)


# Digits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
def test_digits_are_exact_in_16_bits(dtype):
    """Every value of every digit, alone and together with others, and of both signs."""
    digit = torch.arange(256)
    positions = torch.cat([digit, digit * 256, digit * 65_536, digit * 65_793, torch.tensor([2**24 - 1, 131_072])])
    positions = torch.cat([positions, -positions])
    digits, weights = position_digits(positions), torch.tensor(DIGIT_WEIGHTS, dtype=torch.float64)
    stored = digits.to(dtype)
    assert torch.equal(stored.double(), digits.double())
    assert torch.equal(weights.to(dtype).double(), weights)
    assert torch.equal((stored.double() * weights).sum(-1), positions.double())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(position=st.integers(-(2**24) + 1, 2**24 - 1), dtype=st.sampled_from(LOW))
def test_digits_of_any_position(position, dtype):
    weights = torch.tensor(DIGIT_WEIGHTS, dtype=torch.float64)
    assert int((position_digits(torch.tensor([position])).to(dtype).double() * weights).sum()) == position


# Grouped heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("batched", [False, True])
def test_grouped_lanes_are_the_lanes_of_every_head(kv_heads, dtype, batched):
    heads = 6
    prior = off_neutral(goat_prior(heads, num_frequencies=2, length_scale=30.0))
    queries, keys = torch.arange(3, 8), torch.arange(7)
    if batched:
        queries, keys = torch.stack([queries, queries + 2]), torch.stack([keys, keys + 1])
    lanes = prior.lanes(queries, keys, dtype=dtype)
    grouped = lanes.grouped(kv_heads)
    assert grouped.key.shape[-3] == kv_heads
    repeated = grouped.key.repeat_interleave(heads // kv_heads, dim=-3)
    wide = torch.promote_types(dtype, torch.float32)
    assert_close(grouped.query.to(wide) @ repeated.to(wide).transpose(-1, -2), lanes.dense())


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_lanes_that_all_heads_share_are_left_alone(kv_heads):
    lanes = RecencyPrior(6).lanes(torch.arange(5), torch.arange(7), dtype=torch.float32)
    assert lanes.grouped(kv_heads) is lanes


# The recency prior at full length -----------------------------------------------------------------------------------


def causal_weights(scores, queries, keys):
    """Softmax in float64 over the keys at or before each query."""
    return scores.double().masked_fill(keys > queries[:, None], -math.inf).softmax(-1)


def last_rows(length, count=8):
    return torch.arange(length - count, length), torch.arange(length)


def accumulated(query, key):
    """<query, key> of (..., P) lanes, summed one lane after the other in float32, as a kernel's accumulator does."""
    total = torch.zeros(query.shape[0], query.shape[1], key.shape[1])
    for lane in range(query.shape[-1]):
        total = total + query[..., lane, None].float() * key[..., lane].float().unsqueeze(-2)
    return total


def total_variation(actual, expected):
    return float(0.5 * (actual - expected).abs().sum(-1).max())


@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize("dtype", LOW)
def test_recency_attention_survives_16_bits(length, dtype):
    prior, (queries, keys) = RecencyPrior(12), last_rows(length)
    exact = causal_weights(prior.dense(queries, keys, dtype=torch.float64).detach(), queries, keys)
    lanes = prior.lanes(queries, keys, dtype=dtype)
    through_lanes = causal_weights(accumulated(lanes.query, lanes.key).detach(), queries, keys)
    assert total_variation(through_lanes, exact) <= 1e-3


def test_one_16_bit_lane_would_not_survive():
    """The control: what the test above would see of a plain slope * position lane."""
    prior, (queries, keys) = RecencyPrior(12), last_rows(2048)
    exact = causal_weights(prior.dense(queries, keys, dtype=torch.float64).detach(), queries, keys)
    one_lane = (prior.slopes.detach()[:, None] * keys).bfloat16()[:, None].expand(-1, len(queries), -1)
    assert total_variation(causal_weights(one_lane, queries, keys), exact) > 0.3


@pytest.mark.parametrize("dtype", LOW)
def test_lanes_are_finite_at_131072(dtype):
    """float16 ends at 65 504, so a slope * position lane would be inf there."""
    prior = off_neutral(goat_prior(12, num_frequencies=3))
    queries, keys = torch.arange(131_070, 131_073), torch.cat([torch.arange(3), torch.arange(131_066, 131_073)])
    for query_scale in (1.0, 8.0):
        lanes = prior.lanes(queries, keys, dtype=dtype, query_scale=query_scale)
        assert lanes.query.isfinite().all()
        assert lanes.key.isfinite().all()
    error, bound = lane_error(prior, queries, keys, dtype)
    assert error <= bound


class WithoutRest(RecencyPrior):
    """The recency prior without the lane that returns what is left of score gradients."""

    def factors(self, query_positions, key_positions, *, dtype):
        factors = super().factors(query_positions, key_positions, dtype=dtype)
        return tuple(part for part in factors if part.exact != "both")


def slope_gradients(prior, content, backend, first):
    at = range(first, first + content[0].shape[2])
    output = prior_attention(
        *content, prior=prior, query_positions=at, key_positions=at, is_causal=True, backend=backend
    )
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad(output, [prior.strength], weight.to(output.dtype))[0]


@pytest.mark.parametrize("first", [0, 3000, 30_000])
@pytest.mark.parametrize("dtype", LOW)
def test_slope_gradients_are_not_rounding(first, dtype):
    """What is left of a row's score gradients, times a large position, would exceed the signal."""
    generator = torch.Generator().manual_seed(6)
    content = [torch.randn(1, 2, 256, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    wide = [tensor.detach().double().requires_grad_() for tensor in content]
    expected = slope_gradients(RecencyPrior(2), wide, "reference", first)
    error = float((slope_gradients(RecencyPrior(2), content, "sdpa", first) - expected).norm() / expected.norm())
    plain = float((slope_gradients(WithoutRest(2), content, "sdpa", first) - expected).norm() / expected.norm())
    assert error <= 0.05
    assert plain > 1 or first == 0 or dtype == torch.float16


# Long positions in every form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: FourierPrior(HEADS, 4, 4.0, 9000.0), lambda: SinkPrior(HEADS, 3)])
def test_float64_lanes_are_exact_a_million_tokens_out(make):
    prior, (queries, keys) = off_neutral(make()), last_rows(1_000_003)
    lanes = prior.lanes(queries, keys[-50:], dtype=torch.float64).dense()
    truth = prior.dense(queries, keys[-50:], dtype=torch.float64)
    assert_close(centre_rows(lanes), centre_rows(truth), tolerance=5e-10)  # phases of 1e6 radians in float64


def test_a_prior_without_lanes_says_so_through_sums_and_grids():
    table = RelativeBiasPrior(HEADS, 3)
    for prior in (table, table + RecencyPrior(HEADS), 2.0 * table, GridPrior(table, table)):
        assert not prior.has_lanes
        cells = grid_positions(2, 3) if prior.num_coordinates == 2 else torch.arange(5)
        with pytest.raises(NotImplementedError, match="RelativeBiasPrior"):
            prior.lanes(cells, cells, dtype=torch.float32)


def test_the_bound_holds_where_the_terms_of_u_cancel():
    """One key where growth and waves nearly cancel: what float32 rounded away is then as large as u itself."""
    generator = torch.Generator().manual_seed(1)
    prior = SinkPrior(1, 4, length_scale=300.0)
    for _ in range(300):
        off = {name: torch.randn(p.shape, generator=generator) for name, p in prior.named_parameters()}
        key = torch.randint(1, 2000, (1,), generator=generator)
        with torch.no_grad():
            for name, parameter in prior.named_parameters():
                parameter.copy_(off[name])
            rest = prior.key_only(key, dtype=torch.float64) - prior.growth * math.log1p(int(key)) / math.log1p(300)
            prior.growth.copy_((-rest * math.log1p(300) / math.log1p(int(key)))[0])
        lanes = prior.lanes(key, key, dtype=torch.bfloat16)
        error = (lanes.dense().double() - prior.dense(key, key, dtype=torch.float64)).abs().max().detach()
        assert error <= lanes.error_bound + 1e-14  # the terms are of size one, and float64 rounds them too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_lanes_of_shared_key_heads_are_counted(kv_heads, dtype):
    prior, zero = goat_prior(4, num_frequencies=2), torch.zeros(1, dtype=torch.int64)
    grouped = prior.lanes(zero, zero, dtype=dtype).grouped(kv_heads)
    assert prior.num_lanes(dtype, kv_heads) == grouped.num_lanes
