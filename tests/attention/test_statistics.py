"""Streamed statistics against a dense float64 oracle written from the definitions."""

import math

import pytest
import torch
from tolerances import assert_close, relative_error

from eotattn.attention.statistics import row_statistics, weight_statistics
from eotattn.attention.statistics.running import SequenceStatistics

B, H, HK, Q, K, D, V = 2, 4, 2, 5, 9, 8, 3
#: Bounds of the issue for streaming against dense.
BOUND = {torch.float64: 1e-10, torch.float32: 1e-4}


def content(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, Q, D), (B, HK, K, D), (B, HK, K, V))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def oracle(query, key, value, *, scale, softcap=None, prior=None, seen=None, sink=None, star=0):
    """Everything from dense float64 weights."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    score = scale * torch.einsum("bhqd,bhkd->bhqk", query, key)
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    prior = torch.zeros_like(score) if prior is None else prior.double().expand_as(score)
    seen = torch.ones_like(score, dtype=torch.bool) if seen is None else seen.expand_as(score)
    logits = (score + prior).masked_fill(~seen, -math.inf)
    column = torch.full_like(logits[..., :1], -math.inf)
    column = column if sink is None else sink.double()[:, None, None].expand_as(column)
    full = torch.softmax(torch.cat([logits, column], -1), -1)
    p = full[..., :-1]
    others = logits.clone()
    others[..., star] = -math.inf
    rival = others.argmax(-1, keepdim=True)
    pi = torch.softmax(prior.masked_fill(~seen, -math.inf), -1)
    conditional = torch.softmax(logits, -1)
    ratio = torch.where(seen, (conditional.log() - pi.log()).abs(), 0.0)
    return {
        "log_sum_exp": torch.logsumexp(torch.cat([logits, column], -1), -1),
        "key_log_sum_exp": torch.logsumexp(logits, -1),
        "entropy": -torch.special.xlogy(full, full).sum(-1),
        "num_outcomes": seen.double().sum(-1) + (sink is not None),
        "participation": full.square().sum(-1),
        "num_keys": seen.double().sum(-1),
        "score_range": score.masked_fill(~seen, -math.inf).amax(-1) - score.masked_fill(~seen, math.inf).amin(-1),
        "explicit_sink_mass": full[..., -1],
        "margin": logits[..., star] - others.amax(-1),
        "content_margin": score[..., star] - score.gather(-1, rival).squeeze(-1),
        "prior_margin": prior[..., star] - prior.gather(-1, rival).squeeze(-1),
        "prior_divergence": torch.special.xlogy(conditional, conditional / pi).masked_fill(~seen, 0.0).sum(-1),
        "prior_log_ratio": ratio.amax(-1),
        "column_mass": p.sum(-2),
        "column_count": seen.double().sum(-2),
        "output": p @ value,
        "weights": p,
    }


def check(rows, expected, bound):
    summed = SequenceStatistics.of(rows)
    for name, value in expected.items():
        if name in ("prior_divergence", "prior_log_ratio"):
            assert_close(summed.sums[name], value.sum(-1), tolerance=bound * value.shape[-1])
        elif name in ("margin", "content_margin", "prior_margin"):
            defined = ~getattr(rows, name).isnan()
            assert torch.equal(defined, value.isfinite() & expected["margin"].isfinite())
            assert_close(getattr(rows, name)[defined].double(), value[defined], tolerance=bound)
        elif name != "weights":
            assert_close(getattr(rows, name).double(), value, tolerance=bound)


def causal_window(query_start, key_start, window):
    i, j = torch.arange(Q)[:, None] + query_start, torch.arange(K) + key_start
    return (j <= i) & (j > i - window)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("elements", [1, 3 * B * H * K, None])
def test_every_statistic_equals_its_dense_form(dtype, elements):
    query, key, value = content(dtype)
    generator = torch.Generator().manual_seed(1)
    prior, sink = torch.randn(H, Q, K, generator=generator), torch.randn(H, generator=generator)
    rows = row_statistics(
        query,
        key,
        value,
        scale=0.7,
        softcap=2.0,
        log_prior=prior,
        sink_logits=sink,
        is_causal=True,
        window=3,
        query_start=4,
        keys=(3, 0),
        block_elements=elements,
    )
    seen = causal_window(4, 0, 3)
    expected = oracle(query, key, value, scale=0.7, softcap=2.0, prior=prior, seen=seen, sink=sink, star=3)
    check(rows, expected, BOUND[dtype])
    assert_close(rows.key_mass.double(), expected["weights"][..., [3, 0]], tolerance=BOUND[dtype])


@pytest.mark.parametrize("heads", [1, HK, H])
@pytest.mark.parametrize("has_prior", [False, True])
@pytest.mark.parametrize("dtype", BOUND)
def test_a_bias_of_keys_is_a_part_of_the_prior(dtype, has_prior, heads):
    query, key, value = content(dtype)
    generator = torch.Generator().manual_seed(2)
    bias, prior = 5 * torch.randn(B, heads, K, generator=generator).double(), torch.randn(H, Q, K, generator=generator)
    options = {"is_causal": True, "query_start": 3, "sink_logits": torch.ones(H), "block_elements": 2 * B * H * K}
    rows = row_statistics(query, key, value, key_bias=bias, log_prior=prior if has_prior else None, **options)
    whole = bias.repeat_interleave(H // heads, 1)[:, :, None] + has_prior * prior
    seen = causal_window(3, 0, K)
    expected = oracle(query, key, value, scale=D**-0.5, prior=whole, seen=seen, sink=torch.ones(H))
    check(rows, expected, BOUND[dtype])
    with pytest.raises(ValueError, match=r"row_statistics: key_bias must have shape \(2, 1 or 2 or 4, 9\)"):
        row_statistics(query, key, key_bias=bias[..., 1:])


@pytest.mark.parametrize("dtype", BOUND)
def test_plain_attention_equals_its_dense_form(dtype):
    query, key, value = content(dtype, seed=3)
    check(row_statistics(query, key, value), oracle(query, key, value, scale=D**-0.5), BOUND[dtype])


def test_large_logits_stay_within_the_bound():
    query, key, value = content(torch.float32, seed=4)
    rows = row_statistics(40 * query, key, value)
    expected = oracle(40 * query, key, value, scale=D**-0.5)
    assert expected["score_range"].max() > 70
    check(rows, expected, 1e-4)


@pytest.mark.parametrize("strength", [5.0, 20.0, 60.0])
def test_strong_explicit_sinks_leave_the_distance_to_the_prior(strength):
    """What a sink leaves to the keys is little; how they share it is as sharp as without one."""
    query, key, value = content(torch.float32, seed=6)
    sink = torch.full((H,), strength)
    rows = row_statistics(3 * query, key, value, sink_logits=sink)
    check(rows, oracle(3 * query, key, value, scale=D**-0.5, sink=sink), 1e-4)
    sums = SequenceStatistics.of(rows).sums
    assert (sums["prior_log_ratio"] <= sums["score_range"] * (1 + 1e-5)).all()


def test_normalised_entropy_is_one_where_outcomes_are_equal():
    query = torch.zeros(1, 2, 4, 8)
    for options in ({}, {"sink_logits": torch.zeros(2)}):
        sums = SequenceStatistics.of(row_statistics(query, query, **options)).sums
        assert_close(sums["normalised_entropy"], torch.full((1, 2), 4.0).double(), tolerance=1e-6)


def test_bfloat16_inputs_are_computed_in_float32():
    query, key, value = content(torch.bfloat16)
    check(row_statistics(query, key, value), oracle(query, key, value, scale=D**-0.5), 1e-4)


def test_lag_mass_sums_weights_along_diagonals():
    query, key, value = content(torch.float64)
    rows = row_statistics(query, key, is_causal=True, query_start=4, block_elements=2 * B * H * K)
    seen = causal_window(4, 0, 10**6)
    weights = oracle(query, key, value, scale=D**-0.5, seen=seen)["weights"]
    assert rows.first_lag == 4 - (K - 1)
    for index in range(rows.lag_mass.shape[-1]):
        diagonal = torch.diagonal(weights, offset=-(rows.first_lag + index - 4), dim1=-2, dim2=-1).sum(-1)
        assert_close(rows.lag_mass[..., index], diagonal)
    assert rows.lag_mass[..., :4].abs().max() == 0  # the future


@pytest.mark.parametrize("form", ["boolean", "floating", "function"])
def test_forms_of_a_mask_agree(form):
    query, key, value = content(torch.float64)
    seen = torch.rand(B, 1, Q, K, generator=torch.Generator().manual_seed(2)) < 0.6
    seen[0, 0, 2] = False  # a query without keys
    lowest = torch.finfo(torch.float64).min
    masks = {
        "boolean": seen,
        "floating": torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, lowest),
        "function": lambda start, stop: seen[:, :, start:stop],
    }
    rows = row_statistics(query, key, value, mask=masks[form], block_elements=2 * B * H * K)
    assert (rows.log_sum_exp[0, :, 2] == -math.inf).all()
    for name in ("entropy", "participation", "score_min", "score_max", "key_mass", "output"):
        assert (getattr(rows, name)[0, :, 2] == 0).all(), name
    assert not rows.counted[0, 2]
    keep = torch.arange(Q) != 2
    expected = oracle(query, key, value, scale=D**-0.5, seen=seen.expand(B, H, Q, K))
    for name in ("entropy", "participation", "log_sum_exp", "output"):
        assert_close(getattr(rows, name)[:, :, keep], expected[name][:, :, keep], tolerance=1e-10)
    assert_close(rows.column_mass, torch.nan_to_num(expected["weights"]).sum(-2), tolerance=1e-10)


def test_left_padding_is_an_offset():
    """A sequence behind two padding tokens has the statistics of the sequence alone."""
    query, key, value = content(torch.float64)
    key, value = key[:, :, :Q], value[:, :, :Q]
    alone = row_statistics(query[:, :, 2:], key[:, :, 2:], is_causal=True, keys=(0, 1))
    real = torch.arange(Q) >= 2
    padded = row_statistics(
        query,
        key,
        is_causal=True,
        mask=real,
        counted=real.expand(B, Q),
        sequence_start=torch.full((B,), 2),
        keys=(0, 1),
    )
    one, other = SequenceStatistics.of(alone), SequenceStatistics.of(padded)
    assert torch.equal(one.num_queries, other.num_queries)
    for name in one.sums:
        assert_close(other.sums[name], one.sums[name], tolerance=1e-10)
    assert_close(other.key_mass, one.key_mass, tolerance=1e-10)
    assert_close(other.column_mass[..., : Q - 2], one.column_mass, tolerance=1e-10)
    assert other.column_mass[..., Q - 2 :].abs().max() == 0
    assert_close(other.lag_mass[..., 2:-2], one.lag_mass, tolerance=1e-10)


@pytest.mark.parametrize("window", [None, 3])
def test_chunks_with_a_cache_continue_the_sequence(window):
    query, key, value = content(torch.float64)
    key, value = key[:, :, :Q], value[:, :, :Q]
    whole = SequenceStatistics.of(row_statistics(query, key, is_causal=True, window=window, keys=(0, 2)))
    parts = []
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        first = 0 if window is None else max(0, start - window + 1)  # what a sliding cache still holds
        rows = row_statistics(
            query[:, :, start:stop],
            key[:, :, first:stop],
            is_causal=True,
            window=window,
            query_start=start,
            key_start=first,
            keys=(0, 2),
        )
        parts.append(SequenceStatistics.of(rows))
    joined = parts[0].continued(parts[1]).continued(parts[2])
    assert joined.num_sequences == B
    for name in whole.sums:
        assert_close(joined.sums[name], whole.sums[name], tolerance=1e-10)
    for name in ("key_mass", "column_mass", "num_queries"):
        assert_close(getattr(joined, name), getattr(whole, name), tolerance=1e-10)
    spare = whole.max_lag - joined.max_lag  # a sliding cache never meets the longest lags
    assert_close(joined.lag_mass, whole.lag_mass[..., spare : -spare or None], tolerance=1e-10)
    if window is None:  # a dropped key is not counted as admissible, which is what a window means
        assert torch.equal(joined.column_count, whole.column_count)
        for name in whole.margin_sums:
            assert_close(joined.margin_sums[name], whole.margin_sums[name], tolerance=1e-10)


def test_shards_add_up():
    parts = [SequenceStatistics.of(row_statistics(*content(torch.float64, seed)[:2])) for seed in range(3)]
    short = row_statistics(*(x[:, :, :3] for x in content(torch.float64, 3)[:2]))
    parts.append(SequenceStatistics.of(short))
    left, right = (parts[0] + parts[1]) + (parts[2] + parts[3]), ((parts[0] + parts[1]) + parts[2]) + parts[3]
    assert left.num_sequences == 4 * B
    assert torch.equal(left.column_mass, right.column_mass)
    assert left.column_mass[-B:, :, 3:].abs().max() == 0
    assert_close(left.lag_mass.sum((-1, -2)), left.num_queries * H, tolerance=1e-10)
    chosen = left.heads([2])
    assert torch.equal(chosen.sums["entropy"], left.sums["entropy"][:, [2]])
    with pytest.raises(ValueError, match=r"SequenceStatistics: the other must have 4 heads; got 1"):
        _ = left + chosen


def test_theorems_hold_row_by_row():
    """KL and log-ratio to the prior stay below omega; Psi stays below its bound."""
    query, key, _ = content(torch.float64)
    prior = torch.randn(H, Q, K, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rows = row_statistics(3 * query, key, log_prior=prior, sink_logits=torch.ones(H, dtype=torch.float64))
    assert (rows.context_sensitivity <= rows.context_sensitivity_bound + 1e-12).all()
    assert (rows.context_sensitivity_bound < 1).any()
    sums = SequenceStatistics.of(rows).sums
    assert (sums["prior_divergence"] <= sums["score_range"]).all()
    assert (sums["prior_log_ratio"] <= sums["score_range"]).all()
    assert (sums["prior_divergence"] > 0).all()


def test_maps_give_what_the_call_gives():
    query, key, value = content(torch.float64)
    seen = causal_window(4, 0, 4)
    weights = oracle(query, key, value, scale=D**-0.5, seen=seen)["weights"]
    call = row_statistics(query, key, mask=seen, query_start=4, keys=(2, 0))
    stored = weight_statistics(weights, query_start=4, keys=(2, 0))
    for name in ("entropy", "participation", "num_keys", "key_mass", "column_mass", "column_count", "lag_mass"):
        assert_close(getattr(stored, name), getattr(call, name), tolerance=1e-10)
    for name in ("margin", "score_range", "prior_log_sum_exp"):
        ours, theirs = getattr(stored, name), getattr(call, name)
        assert_close(torch.nan_to_num(ours), torch.nan_to_num(theirs), tolerance=1e-10)


def test_the_comparison_can_fail():
    query, key, value = content(torch.float64)
    expected = oracle(query, key, value, scale=D**-0.5)
    wrong = row_statistics(query, key, value, scale=1.01 * D**-0.5)
    for name in ("log_sum_exp", "entropy", "participation", "column_mass", "output", "score_range"):
        assert relative_error(getattr(wrong, name), expected[name]) > 1e-4


def test_bad_arguments_are_named():
    query, key, value = content(torch.float32)
    cases = [
        ({"query": query[0]}, ValueError, r"row_statistics: query must have shape"),
        ({"key": key[..., :4]}, ValueError, r"row_statistics: key must have shape \(2, any, any, 8\)"),
        ({"value": value[:, :, :2]}, ValueError, r"row_statistics: value must have shape"),
        ({"query": query.long()}, TypeError, r"row_statistics: query must have a floating dtype"),
        ({"scale": -1.0}, ValueError, r"row_statistics: scale must be positive"),
        ({"softcap": 0.0}, ValueError, r"row_statistics: softcap must be positive"),
        ({"window": 0}, ValueError, r"row_statistics: window must be at least 1"),
        ({"keys": ()}, ValueError, r"row_statistics: keys must name at least one key"),
        ({"sink_logits": torch.zeros(3)}, ValueError, r"row_statistics: sink_logits must have shape \(4,\)"),
        ({"mask": torch.ones(3, 3)}, ValueError, r"row_statistics: mask must broadcast to \(2, 4, 5, 9\)"),
        ({"counted": torch.ones(2, 2)}, ValueError, r"row_statistics: counted must have shape"),
    ]
    for changed, error, message in cases:
        arguments = {"query": query, "key": key, "value": value, **changed}
        with pytest.raises(error, match=message):
            row_statistics(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)
