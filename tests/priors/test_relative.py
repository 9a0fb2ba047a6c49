"""Relative priors against their papers' formulas, rewritten independently; what they are far away; tables of others."""

import math

import pytest
import torch
from priors.cases import HEADS, off_neutral
from tolerances import assert_close, centre_rows

from eotattn.priors import (
    AlibiPrior,
    DensePrior,
    GridTablePrior,
    HeadsPrior,
    KerplePrior,
    RecencyPrior,
    RelativeBiasPrior,
    SinkPrior,
    T5Prior,
    alibi_slopes,
    grid_positions,
)

QUERIES, KEYS = torch.arange(40, 45), torch.arange(90)


def exact(prior, queries=QUERIES, keys=KEYS):
    return prior.dense(queries, keys, dtype=torch.float64).detach()


def by_lag(formula, queries=QUERIES, keys=KEYS):
    """(H, Q, K) of formula(head, query, key), one number at a time."""
    rows = [[[formula(h, i, j) for j in keys.tolist()] for i in queries.tolist()] for h in range(HEADS)]
    return torch.tensor(rows, dtype=torch.float64)


def t5_bucket(relative, bidirectional, num_buckets, max_distance):
    """The paper's buckets of key - query, in floating point as its authors published them."""
    bucket = 0
    if bidirectional:
        num_buckets //= 2
        bucket += num_buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact_buckets = num_buckets // 2
    if distance < exact_buckets:
        return bucket + distance
    position = math.log(distance / exact_buckets) / math.log(max_distance / exact_buckets)
    return bucket + min(exact_buckets + int(position * (num_buckets - exact_buckets) + 1e-9), num_buckets - 1)


def test_alibi_is_the_papers_formula():
    slopes = alibi_slopes(HEADS)
    assert_close(exact(AlibiPrior(HEADS)), by_lag(lambda h, i, j: -slopes[h] * abs(i - j)))
    past = KEYS[:41]
    assert_close(exact(AlibiPrior(HEADS), QUERIES, past), exact(RecencyPrior(HEADS), QUERIES, past))
    assert not [parameter for parameter in AlibiPrior(HEADS).parameters() if parameter.requires_grad]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (12, 9), (64, 33)])
def test_t5_is_the_papers_formula(buckets, distance, bidirectional):
    prior = off_neutral(T5Prior(HEADS, buckets, distance, bidirectional=bidirectional))
    table, keys = prior.table.detach().double(), torch.arange(400)
    expected = by_lag(lambda h, i, j: table[h, t5_bucket(j - i, bidirectional, buckets, distance)], QUERIES + 150, keys)
    assert_close(exact(prior, QUERIES + 150, keys), expected)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (4, 9), (64, 256), (48, 500)])
def test_t5_buckets_are_those_of_transformers(buckets, distance, bidirectional):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    prior, lag = T5Prior(1, buckets, distance, bidirectional=bidirectional), torch.arange(-2 * distance, 2 * distance)
    ours = prior.entry(lag.clamp(-prior.reach, prior.reach))
    assert torch.equal(ours, t5._relative_position_bucket(-lag, bidirectional, buckets, distance))


def test_t5_takes_the_table_of_a_trained_model():
    weight = torch.randn(32, HEADS, generator=torch.Generator().manual_seed(0))
    prior = T5Prior.from_t5(weight)
    assert torch.equal(prior.table.T, weight)
    assert exact(prior, torch.tensor([7]), torch.tensor([4]))[:, 0, 0].tolist() == weight[3].tolist()
    assert exact(prior, torch.tensor([4]), torch.tensor([7]))[:, 0, 0].tolist() == weight[19].tolist()


def test_kerple_is_the_papers_formula():
    log, power = off_neutral(KerplePrior(HEADS)), off_neutral(KerplePrior(HEADS, "power"))
    first, second = (parameter.detach().double().abs().tolist() for parameter in log.parameters())
    assert_close(exact(log), by_lag(lambda h, i, j: -first[h] * math.log(1 + second[h] * abs(i - j))))
    first, second = (parameter.detach().double().abs().tolist() for parameter in power.parameters())
    assert_close(exact(power), by_lag(lambda h, i, j: -first[h] * abs(i - j) ** min(second[h], 2.0)))


def swin_window(size, table):
    """Swin's own indexing of its table ((2 size - 1)^2, H) as (H, size^2, size^2)."""
    at = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    relative = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + size - 1
    return table[relative[..., 0] * (2 * size - 1) + relative[..., 1]].permute(2, 0, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_swin_windows_have_a_lane_a_cell(dtype):
    table = torch.randn(169, HEADS, generator=torch.Generator().manual_seed(0))
    prior, window = GridTablePrior.from_swin(table, 7, 7), grid_positions(7, 7)
    expected = swin_window(7, table.double())
    assert_close(exact(prior, window, window), expected)
    lanes = prior.lanes(window, window, dtype=dtype, tolerance=1e-5)
    assert torch.linalg.matrix_rank(expected).max() <= 49
    assert lanes.num_lanes == 49 * {torch.bfloat16: 3, torch.float16: 2}.get(dtype, 1)
    assert_close(centre_rows(lanes.dense().detach().double()), centre_rows(expected), tolerance=2e-5)
    assert lanes.error_bound <= 0.1  # the sum over all lanes, of which a pair has one cell


def test_larger_grids_have_no_lanes_and_count_what_lies_beyond_as_their_border():
    assert not GridTablePrior(HEADS, 13, 5).has_lanes
    small = off_neutral(GridTablePrior(HEADS, 3, 2))
    beyond = torch.tensor([[5, -0.4], [2, 9], [-1, -1]])
    border = torch.tensor([[2, 0], [2, 1], [-1, -1]])
    cells = grid_positions(3, 2)
    assert_close(exact(small, beyond, cells), exact(small, border, cells))
    assert_close(exact(small, cells, beyond), exact(small, cells, border))
    lanes = small.lanes(beyond, cells, dtype=torch.float64)
    assert_close(centre_rows(lanes.dense().detach()), centre_rows(exact(small, beyond, cells)))


FAR = {
    "alibi": lambda: AlibiPrior(HEADS),
    "table": lambda: off_neutral(RelativeBiasPrior(HEADS, 4)),
    "no table": lambda: off_neutral(RelativeBiasPrior(HEADS, 0)),
    "t5": lambda: off_neutral(T5Prior(HEADS, 12, 9)),
    "t5 causal": lambda: off_neutral(T5Prior(HEADS, 7, 9, bidirectional=False)),
    "sum": lambda: off_neutral(T5Prior(HEADS, 12, 9)) + off_neutral(SinkPrior(HEADS)) + AlibiPrior(HEADS),
    "multiple": lambda: (off_neutral(T5Prior(HEADS, 12, 9)) + AlibiPrior(HEADS)) * (0.5, -2.0, 1.5),
    "kerple": lambda: off_neutral(KerplePrior(HEADS)) * (0.5, 1.0, -2.0) + off_neutral(T5Prior(HEADS, 12, 9)),
    "heads": lambda: HeadsPrior(off_neutral(T5Prior(2, 12, 9)) + AlibiPrior(2), (1, 0, 1)),
}


@pytest.mark.parametrize("name", FAR)
def test_the_far_form_is_the_prior_far_away(name):
    prior = FAR[name]()
    keys = torch.arange(300)
    form, dense = prior.far_form(), exact(prior, QUERIES + 100, keys)
    lag = QUERIES[:, None] + 100 - keys
    for tail, far in ((form.past, lag >= form.reach), (form.future, lag <= -max(form.reach, 1))):
        value = torch.zeros_like(dense)
        if tail.prior is not None:
            assert tail.prior.has_lanes
            value = value + exact(tail.prior, QUERIES + 100, keys)
        if tail.constant is not None:
            value = value + tail.constant.detach().double()[:, None, None]
        if tail.decay is not None:
            value = value + tail.decay(lag.abs().flatten().double()).detach().view(dense.shape)
        assert far.any()
        assert_close(torch.where(far, value, 0.0), torch.where(far, dense, 0.0))


def test_what_is_nothing_simple_far_away_has_no_far_form():
    assert (T5Prior(HEADS) + DensePrior(torch.zeros(HEADS, 9, 9))).far_form() is None
    assert GridTablePrior(HEADS, 7, 7).far_form() is None


BAD = {
    "buckets": (lambda: T5Prior(2, 2), "T5Prior: num_buckets must be at least 4; got 2"),
    "odd": (lambda: T5Prior(2, 9), "num_buckets must be even where it is bidirectional; got 9"),
    "distance": (lambda: T5Prior(2, 32, 8), "max_distance must be at least 9; got 8"),
    "count": (lambda: T5Prior.from_t5(torch.zeros(31, 2)), r"T5Prior.from_t5: weight must have shape \(32, any\)"),
    "window": (lambda: GridTablePrior.from_swin(torch.zeros(169, 2), 8, 8), r"table must have shape \(225, any\)"),
    "form": (lambda: KerplePrior(2, "linear"), "KerplePrior: form must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_one_line(name):
    build, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
