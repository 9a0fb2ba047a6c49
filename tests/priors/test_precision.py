"""Lanes in the formats of kernels: stated bounds, splitting, the range of float16, grouped heads, and their number."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from priors.cases import CASES, HEADS, off_neutral
from tolerances import TOLERANCE, assert_close, centre_rows

from eotattn.attention import prior_attention
from eotattn.priors import (
    ClassTokenPrior,
    FourierPrior,
    GridPrior,
    KeyTablePrior,
    RecencyPrior,
    RelativeBiasPrior,
    SinkPrior,
    goat_prior,
    grid_positions,
)
from eotattn.priors.splitting import significant_digits, split_numbers

LOW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *LOW]

#: Tolerances in nats that take one, and three, numbers a factor.
ONE_PIECE, THREE_PIECES = 1e3, 1e-9


def spread(matrix):
    """Largest difference within a row, which no constant of a row changes: at most twice the error of an entry."""
    return float((matrix.amax(-1) - matrix.amin(-1)).max().detach())


def lane_error(prior, queries, keys, dtype, *, query_scale=1.0, **options):
    """Half the largest spread of errors in a row against the float64 truth, and the stated bound."""
    lanes = prior.lanes(queries, keys, dtype=dtype, query_scale=query_scale, **options)
    truth = query_scale * prior.dense(queries, keys, dtype=torch.float64)
    return spread(lanes.dense().double() - truth) / 2, lanes.error_bound


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
    dtype=st.sampled_from([torch.float32, *LOW]),
    part=st.sampled_from(["fourier", "recency", "sink", "goat"]),
    kv_heads=st.sampled_from([1, HEADS]),
    tolerance=st.sampled_from([None, ONE_PIECE, 1e-3, THREE_PIECES]),
    query_scale=st.sampled_from([1.0, 8.0, 0.3]),
)
def test_lanes_stay_within_their_bound(
    queries, keys, amplitude, other, strength, dtype, part, kv_heads, tolerance, query_scale
):
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
    options = {"num_kv_heads": kv_heads, "tolerance": tolerance, "query_scale": query_scale}
    error, bound = lane_error(chosen, queries, keys, dtype, **options)
    assert error <= bound


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    positions=st.lists(st.floats(0, 70_000, allow_subnormal=False, width=32), min_size=2, max_size=6).map(torch.tensor),
    dtype=st.sampled_from([torch.float32, *LOW]),
    part=st.integers(0, 2),
)
def test_lanes_of_fractional_positions_stay_within_their_bound(positions, dtype, part):
    prior = off_neutral(goat_prior(HEADS, form="paper", num_frequencies=3, length_scale=300.0)).parts[part]
    error, bound = lane_error(prior, positions, positions, dtype)
    assert error <= bound


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", [name for name, (make, _) in CASES.items() if make().has_lanes])
def test_the_bound_is_not_absurd_and_splitting_pays(name, dtype):
    prior = CASES[name][0]()
    coordinates = prior.num_coordinates
    cells = grid_positions(5, 7, class_token=True) if coordinates > 1 else torch.arange(601)
    cells = torch.cat([cells, cells[:, :1]], dim=-1) if coordinates == 3 else cells
    plain, plain_bound = lane_error(prior, cells, cells, dtype, tolerance=ONE_PIECE)
    error, bound = lane_error(prior, cells, cells, dtype, tolerance=THREE_PIECES)
    assert plain <= plain_bound
    assert error <= bound <= plain_bound / 20
    is_exact = name == "class token" and dtype == torch.float16  # its weights have eleven digits
    assert error <= plain / 5 or is_exact


def test_more_pieces_mean_smaller_errors():
    prior = off_neutral(FourierPrior(HEADS, 4, 4.0, 512.0), size=2.0)
    cells = torch.arange(300)
    wanted = (ONE_PIECE, 1e-3, THREE_PIECES)
    errors = [lane_error(prior, cells, cells, torch.bfloat16, tolerance=tolerance)[0] for tolerance in wanted]
    assert errors[0] > 1e-2
    assert errors[1] < errors[0] / 50
    assert errors[2] < errors[1] / 10
    lanes = [prior.num_lanes(torch.bfloat16, tolerance=tolerance) for tolerance in wanted]
    assert lanes == [8, 24, 48]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_tolerance_in_nats_is_kept(part, tolerance, dtype):
    """By priors that span what they commonly do: waves of one nat, ALiBi's slopes over twenty nats, u of eight."""
    prior = goat_prior(HEADS, form="paper", num_frequencies=3, length_scale=300.0).parts[part]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in prior.parameters():
            unit = torch.nn.functional.normalize(torch.randn(parameter.shape, generator=generator), dim=-1, p=1)
            parameter.copy_((unit / 2, parameter, 2 * unit)[part])
    slopes = torch.tensor([1 / 16, 1 / 256, 1 / 4])
    for head, reach in enumerate((20 / slopes).long().tolist()):
        at = torch.arange(2000, 2000 + reach + 1) if part == 1 else torch.arange(500)
        error, _ = lane_error(prior.heads([head]), at[-1:], at, dtype, tolerance=tolerance)
        assert error <= 2 * tolerance  # of the slope and of the position's sum, which is exact


def test_the_bound_holds_where_the_terms_of_u_cancel():
    """One key where growth and waves nearly cancel: what float32 rounded away is then as large as u itself."""
    generator = torch.Generator().manual_seed(1)
    prior = SinkPrior(1, 4, length_scale=300.0)
    for _ in range(100):
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


# Splitting ----------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from(LOW), count=st.integers(1, 3))
def test_whole_numbers_are_sums_of_few_numbers_of_16_bits(data, dtype, count):
    """Below 2^8, 2^16 and 2^24 in one, two and three of bfloat16, divided by the root of their size as lanes are."""
    digits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    assert significant_digits(dtype) == digits
    bits = min(digits * count, 30)
    number = data.draw(st.integers(1 - 2**bits, 2**bits - 1))
    divisor = 2.0 ** (bits // 2)
    value = torch.tensor([number / divisor], dtype=torch.float64)
    pieces = split_numbers(value, dtype, count)
    assert [piece.dtype for piece in pieces] == [dtype] * count
    assert int(sum(piece.double() for piece in pieces) * divisor) == number


@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12)])
def test_every_piece_takes_its_digits_off_the_error(dtype, roundoff):
    """Round to nearest leaves at most half a unit in the last place: 2^-9 and 2^-12 of a number in [1, 2)."""
    values = 1 + torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for count in (1, 2, 3):
        rest = values - sum(piece.double() for piece in split_numbers(values, dtype, count))
        assert rest.abs().max() <= max((2 * roundoff) ** count, torch.finfo(dtype).smallest_normal * 2**-10)


# The range of float16 -----------------------------------------------------------------------------------------------


def attention_error(prior, dtype, scale, queries, keys):
    """Largest error of the output through lanes against the formula in float64, relative to the largest output."""
    generator = torch.Generator().manual_seed(3)
    shapes = (len(queries), len(keys), len(keys))
    query, key, value = (torch.randn(1, prior.num_heads, n, 16, generator=generator).to(dtype) for n in shapes)
    query = query * min(1.0, 0.25 / scale)
    output = prior_attention(
        query, key, value, prior=prior, query_positions=queries, key_positions=keys, scale=scale, backend="sdpa"
    )
    log_prior = prior.dense(queries, keys, dtype=torch.float64)
    exact = (scale * query.double() @ key.double().mT + log_prior).softmax(-1) @ value.double()
    return float((output.double() - exact).abs().max().detach() / exact.abs().max().detach())


def tall_sink():
    prior = SinkPrior(2, 0, length_scale=40.0)
    with torch.no_grad():
        prior.first_token.copy_(torch.tensor([100.0, -100.0]))
        prior.growth.copy_(torch.tensor([-100.0, 100.0]))
    return prior


def tall_table():
    prior = KeyTablePrior(2, 50)
    with torch.no_grad():
        prior.table.copy_(100 * torch.randn(2, 50, generator=torch.Generator().manual_seed(4)))
    return prior


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    ("make_prior", "scale"),
    [
        (lambda: RecencyPrior(2, mean_lags=[2.0, 50.0]), 0.0015),
        (tall_sink, 1e-3),
        (tall_table, 1e-3),
        (lambda: off_neutral(goat_prior(2, num_frequencies=2)), 1e-3),
        (lambda: RecencyPrior(2, mean_lags=[2.0, 50.0]), 40.0),
    ],
    ids=["recency at a small scale", "u of 100 nats", "table of 100 nats", "goat at a small scale", "a large scale"],
)
@pytest.mark.parametrize("first", [0, 100_000])
def test_small_and_large_scales_stay_in_range(make_prior, scale, first, dtype):
    """Lanes are divided by the scale that the kernel multiplies with: 667 times a slope of 40 000 tokens overflows."""
    keys = torch.arange(first, first + 300)
    assert attention_error(make_prior(), dtype, scale, keys[-9:], keys) <= 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("first", [2**24 - 200, 2**24, 2**26 + 1])
def test_positions_beyond_all_digits_of_float32(first, dtype):
    """Waves and slopes count from among the keys; u(j) of the distant token has a growth of 10 digits."""
    prior = off_neutral(goat_prior(2, num_frequencies=2))
    keys = torch.arange(first, first + 300)
    assert attention_error(prior, dtype, 0.25, keys[-9:], keys) <= 3 * TOLERANCE[dtype]
    scattered = torch.cat([torch.arange(3), keys])
    error, bound = lane_error(prior, scattered[-4:], scattered, dtype)
    assert error <= bound
    assert math.isfinite(bound)


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


@pytest.mark.parametrize("make", [lambda: FourierPrior(HEADS, 4, 4.0, 9000.0), lambda: SinkPrior(HEADS, 3)])
def test_float64_lanes_are_exact_a_million_tokens_out(make):
    prior, keys = off_neutral(make()), torch.arange(1_000_003 - 50, 1_000_003)
    lanes = prior.lanes(keys[-8:], keys, dtype=torch.float64).dense()
    truth = prior.dense(keys[-8:], keys, dtype=torch.float64)
    assert_close(centre_rows(lanes), centre_rows(truth), tolerance=5e-10)  # phases of 1e6 radians in float64


# Grouped heads, and how many lanes there are ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("batched", [False, True])
def test_grouped_lanes_are_the_prior_of_every_head(kv_heads, dtype, batched):
    heads = 6
    prior = off_neutral(goat_prior(heads, num_frequencies=2, length_scale=30.0))
    queries, keys = torch.arange(3, 8), torch.arange(7)
    if batched:
        queries, keys = torch.stack([queries, queries + 2]), torch.stack([keys, keys + 1])
    lanes = prior.lanes(queries, keys, dtype=dtype, num_kv_heads=kv_heads, tolerance=1e-6)
    assert lanes.key.shape[-3] in (1, kv_heads)
    exact = prior.dense(queries, keys, dtype=torch.float64)
    assert_close(centre_rows(lanes.dense()), centre_rows(exact), tolerance=1e-5 if dtype in LOW else TOLERANCE[dtype])


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_lanes_that_all_heads_share_are_not_repeated(kv_heads):
    lanes = RecencyPrior(6).lanes(torch.arange(5), torch.arange(7), dtype=torch.float32, num_kv_heads=kv_heads)
    assert lanes.key.shape[-3] == 1
    assert lanes.num_lanes == RecencyPrior(6).num_lanes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tolerance", [None, 1e-4])
def test_lanes_of_shared_key_heads_are_counted(kv_heads, dtype, tolerance):
    prior, zero = goat_prior(4, num_frequencies=2), torch.zeros(1, dtype=torch.int64)
    lanes = prior.lanes(zero, zero, dtype=dtype, num_kv_heads=kv_heads, tolerance=tolerance)
    assert prior.num_lanes(dtype, kv_heads, tolerance) == lanes.num_lanes


@pytest.mark.parametrize("form", ["split", "paper"])
@pytest.mark.parametrize("heads", [8, 12])
def test_the_default_prior_with_four_frequencies_fits_in_16_columns(heads, form):
    """One number for a wave, two for a slope, two for u(j), a lane for the gradient of slopes; and one for padding."""
    prior = goat_prior(heads, num_frequencies=4, form=form)
    waves, recency, sink = (part.num_lanes(torch.bfloat16) for part in prior.parts)
    assert waves == 2 * 4 * 1
    assert recency == 2 * 2 + 1  # two numbers of a position, by two of a slope
    assert sink == 2
    assert prior.num_lanes(torch.bfloat16) == prior.num_lanes(torch.float16) == waves + recency + sink == 15
    assert prior.num_lanes(torch.float32) == prior.num_lanes(torch.float64) == 2 * 4 + 2 + 1


def test_a_prior_without_lanes_says_so_through_sums_and_grids():
    table = RelativeBiasPrior(HEADS, 3)
    combined = (table, table + RecencyPrior(HEADS), 2.0 * table, GridPrior(table, table), table.heads([0]))
    for prior in (*combined, GridPrior(table, table) + ClassTokenPrior(HEADS)):
        assert not prior.has_lanes
        cells = grid_positions(2, 3) if prior.num_coordinates == 2 else torch.arange(5)
        with pytest.raises(NotImplementedError, match="RelativeBiasPrior"):
            prior.lanes(cells, cells, dtype=torch.float32)
        with pytest.raises(NotImplementedError, match="RelativeBiasPrior"):
            prior.num_lanes()
