"""The table of heads: streamed quantities equal dense ones; dense ones equal their definitions."""

import math

import head_oracles as dense
import numpy as np
import pytest
import torch
from tolerances import assert_close

from eotattn.attention.statistics import row_statistics, weight_statistics
from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.diagnostics.heads import head_report
from eotattn.diagnostics.sinks import sink_mass

N, H, L, D = 5, 3, 11, 4


@pytest.fixture(params=[True, False], ids=["causal", "full"])
def calls(request):
    """Streamed statistics and the dense weights of the same calls."""
    generator = torch.Generator().manual_seed(0)
    query, key = (2 * torch.randn(N, H, L, D, generator=generator, dtype=torch.float64) for _ in range(2))
    score = 0.5 * query @ key.mT
    if request.param:
        score = score.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -math.inf)
    stats = SequenceStatistics.of(row_statistics(query, key, is_causal=request.param))
    return stats, torch.softmax(score, -1), request.param


def test_streamed_quantities_equal_dense_ones(calls):
    stats, weights, is_causal = calls
    report = head_report({"a": stats}, keys=(0, 4), local_width=2)
    count = torch.arange(1.0, L + 1).double() if is_causal else torch.full((L,), float(L)).double()
    normalised = dense.entropy(weights) / count.clamp(min=2).log()
    expected = {
        "entropy": dense.entropy(weights).mean(-1),
        "normalised entropy": normalised.mean(-1),
        "participation": dense.participation(weights).mean(-1),
        "column concentration": dense.column_concentration(weights),
        "doubly stochastic distance": dense.doubly_stochastic_distance(weights),
        "mass within 2 tokens": dense.local_mass(weights, 2),
        "context sensitivity": dense.context_sensitivity(weights).mean(-1),
        "sink mass of key 0": sink_mass(weights).mean(-1),
        "sink mass of key 4": sink_mass(weights, 4)[..., 4 if is_causal else 0 :].mean(-1),
        "distance to prior": (count.log() - dense.entropy(weights)).mean(-1),
    }
    for name, values in expected.items():
        assert_close(torch.from_numpy(report.mean[name][0]), values.mean(0), tolerance=1e-10)
        assert (report.low[name] <= report.mean[name]).all(), name
        assert (report.mean[name] <= report.high[name]).all(), name
    rate = (expected["sink mass of key 0"] > 0.3).double().mean()
    assert report.sink_rate[0.3][0] == pytest.approx(float(rate))
    assert (report.mean["log ratio to prior"] <= report.mean["omega"]).all()
    assert (report.mean["context sensitivity"] <= report.mean["sensitivity bound"]).all()
    parts = report.mean["content margin"] + report.mean["prior margin"]
    np.testing.assert_allclose(parts, report.mean["margin"], atol=1e-10)
    np.testing.assert_allclose(report.lag_profile[0].sum(-1), 1.0, atol=1e-10)


def test_maps_and_calls_give_one_table(calls):
    stats, weights, _ = calls
    stored = SequenceStatistics.of(weight_statistics(weights))
    one, other = head_report({"a": stats}).mean, head_report({"a": stored}).mean
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-9, err_msg=name)


def test_dense_forms_against_loops():
    weights = torch.softmax(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), -1)
    p = weights.tolist()
    assert dense.entropy(weights)[1].item() == pytest.approx(-sum(x * math.log(x) for x in p[1]))
    assert dense.participation(weights)[2].item() == pytest.approx(sum(x * x for x in p[2]))
    share = [sum(row[j] for row in p) / 4 for j in range(4)]
    assert dense.column_concentration(weights).item() == pytest.approx(sum(c * c for c in share))
    assert dense.doubly_stochastic_distance(weights).item() == pytest.approx(sum(abs(c - 0.25) for c in share) / 2)
    near = sum(p[i][j] for i in range(4) for j in range(4) if abs(i - j) <= 1) / 4
    assert dense.local_mass(weights, 1).item() == pytest.approx(near)
    assert dense.context_sensitivity(weights, 2)[3].item() == pytest.approx(1 - p[3][2])


def test_sink_rates_are_those_of_sequences_that_have_the_key():
    def maps(length):
        weights = torch.zeros(1, 2, length, length, dtype=torch.float64)
        weights[..., length - 1] = 1.0
        return SequenceStatistics.of(weight_statistics(weights))

    both = {"first": maps(3) + maps(6)}
    assert head_report(both, keys=(5,)).sink_rate[0.3].tolist() == [1.0]
    assert np.isnan(head_report(both, keys=(6,)).sink_rate[0.3]).all()


def test_layers_may_differ_in_heads_and_one_sequence_has_no_interval(calls):
    stats, _, _ = calls
    few = stats.heads([1]).sequences(torch.tensor([0]))
    report = head_report({"many": stats, "few": few})
    assert np.isnan(report.mean["entropy"][1, 1:]).all()
    assert np.isnan(report.low["entropy"][1]).all()
    table = report.to_dict()
    assert table["layer"].tolist() == ["many"] * H + ["few"]
    assert table["head"].tolist() == [0, 1, 2, 0]
    assert str(report).count("\n") == 2


def test_bad_arguments_are_named(calls):
    stats, _, _ = calls
    with pytest.raises(ValueError, match=r"head_report: layers must hold at least one layer"):
        head_report({})
    with pytest.raises(ValueError, match=r"head_report: keys must be at least 0"):
        head_report({"a": stats}, keys=(-1,))
