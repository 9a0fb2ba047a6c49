"""Sink statistics against loops in plain Python, and against the theorem that ties them together."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eotattn.diagnostics import score_range, sink_mass, sink_mass_by_score_range


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def test_score_range_equals_a_loop_over_admissible_keys():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 5, 7, generator=generator)
    seen = torch.rand(5, 7, generator=generator) < 0.6
    seen[2] = False
    got = score_range(scores, seen)
    assert got.shape == (2, 3, 5)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                row = [float(scores[b, h, i, j]) for j in range(7) if seen[i, j]]
                assert float(got[b, h, i]) == pytest.approx(max(row) - min(row) if row else 0.0, abs=1e-6)


def test_score_range_ignores_what_is_inadmissible_even_if_it_is_not_finite():
    scores = torch.tensor([[0.0, math.nan, math.inf], [1.0, 3.0, -math.inf]])
    assert score_range(scores, causal(2, 2).new_tensor([[1, 0, 0], [1, 1, 0]])).tolist() == [0.0, 2.0]
    with pytest.raises(ValueError, match="scores at admissible keys must be finite"):
        score_range(scores)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 9), st.floats(0.0, 6.0))
def test_sink_mass_stays_within_the_bound_of_the_score_range(seed, keys, strength):
    """The theorem: prior * exp(-omega) <= mass <= prior * exp(omega)."""
    generator = torch.Generator().manual_seed(seed)
    scores = strength * torch.randn(4, keys, generator=generator, dtype=torch.float64)
    log_prior = torch.randn(keys, generator=generator, dtype=torch.float64)
    omega, mass = score_range(scores), sink_mass((scores + log_prior).softmax(-1))
    prior = log_prior.softmax(-1)[0]
    assert bool((mass >= prior * (-omega).exp() * (1 - 1e-12)).all())
    assert bool((mass <= prior * omega.exp() * (1 + 1e-12)).all())


def test_sink_mass_picks_the_named_key():
    weights = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(1)).softmax(-1)
    assert torch.equal(sink_mass(weights, key=4), weights[..., 4])
    assert torch.equal(sink_mass(weights, key=-1), weights[..., 6])


def test_bins_hold_every_observation_once_and_average_them():
    generator = torch.Generator().manual_seed(2)
    omega = torch.rand(3, 41, generator=generator) * 5
    mass = torch.rand(3, 41, generator=generator)
    report = sink_mass_by_score_range(omega, mass, num_bins=6)
    x, y = omega.double().flatten().numpy(), mass.double().flatten().numpy()
    assert report.counts.sum() == 123
    assert report.counts.max() - report.counts.min() <= 1
    for m in range(6):
        low, high = report.bin_edges[m], report.bin_edges[m + 1]
        inside = (x >= low) & ((x < high) if m < 5 else (x <= high))
        assert report.counts[m] == inside.sum()
        assert report.mean_sink_mass[m] == pytest.approx(y[inside].mean())
        assert report.mean_score_range[m] == pytest.approx(x[inside].mean())
        assert report.standard_error[m] == pytest.approx(y[inside].std(ddof=1) / math.sqrt(inside.sum()))


def test_equal_signals_share_one_bin():
    report = sink_mass_by_score_range(torch.zeros(5), torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8]), num_bins=3)
    assert report.counts.tolist() == [5]
    assert report.mean_sink_mass[0] == pytest.approx(0.4)


def test_report_prints_a_line_a_bin_and_converts_to_arrays():
    report = sink_mass_by_score_range(torch.arange(6.0), torch.linspace(1, 0, 6), num_bins=3)
    assert len(str(report).splitlines()) == 4
    assert all(isinstance(value, np.ndarray) for value in report.to_dict().values())


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: score_range([1.0]), TypeError, "scores must be a tensor"),
        (lambda: score_range(torch.zeros(3)), ValueError, r"have shape \(..., Q, K\)"),
        (lambda: score_range(torch.zeros(2, 3), torch.ones(2, 3)), TypeError, "admissible must be a boolean tensor"),
        (lambda: score_range(torch.zeros(2, 3), causal(3, 3)), ValueError, "admissible must broadcast"),
        (lambda: sink_mass(torch.zeros(2, 3), key=3), ValueError, "key must be an integer from -3 to 2; got 3"),
        (lambda: sink_mass(torch.full((2, 3), 2.0)), ValueError, r"lie in \[0, 1\]"),
        (lambda: sink_mass(torch.full((2, 3), math.nan)), ValueError, "hold no NaN|be finite"),
        (lambda: sink_mass_by_score_range(torch.zeros(3), torch.zeros(4)), ValueError, "sink_mass must have the shape"),
        (lambda: sink_mass_by_score_range(-torch.ones(3), torch.zeros(3)), ValueError, "be non-negative"),
        (lambda: sink_mass_by_score_range(torch.ones(3), torch.zeros(3), num_bins=4), ValueError, "at most the 3 obs"),
        (lambda: sink_mass_by_score_range(torch.ones(3), torch.zeros(3), num_bins=0), ValueError, "be at least 1"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, error, says):
    with pytest.raises(error, match=says):
        call()
