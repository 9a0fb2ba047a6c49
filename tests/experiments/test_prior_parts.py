"""Splitting a prior: the parts add up, and the gauge changes nothing that softmax sees."""

import math

import pytest
import torch
from tolerances import assert_close

from eotattn.experiments.prior_parts import PriorParts, key_only_part, split_prior
from eotattn.priors import RecencyPrior, goat_prior


def trained_prior():
    generator = torch.Generator().manual_seed(0)
    prior = goat_prior(3, num_frequencies=2, length_scale=7.0)
    for parameter in prior.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    return prior


def test_parts_add_up_to_what_attention_adds():
    parts = split_prior(trained_prior(), 7)
    for i in range(7):
        for j in range(7):
            for h in range(3):
                total = float(parts.total[h, i, j])
                summed = float(parts.relative[h, i - j] + parts.key_only[h, j]) if j <= i else -math.inf
                assert total == pytest.approx(summed)


def test_gauge_without_key_slope_is_invisible_and_has_no_slope():
    parts = split_prior(trained_prior(), 7)
    fixed = parts.without_key_slope()
    assert_close(fixed.total.softmax(-1), parts.total.softmax(-1))
    position = torch.arange(1, 7, dtype=torch.float64)
    slopes = ((position - position.mean()) * fixed.key_only[:, 1:]).sum(-1)
    assert_close(slopes, torch.zeros(3, dtype=torch.float64))
    assert float((parts.key_only - fixed.key_only).abs().max()) > 0.1
    again = PriorParts(fixed.key_only, fixed.relative, fixed.total).without_key_slope()
    assert_close(again.key_only, fixed.key_only)


def test_a_key_slope_becomes_a_recency_slope():
    position = torch.arange(5, dtype=torch.float64)
    flat = torch.zeros(1, 5, dtype=torch.float64)
    fixed = PriorParts(0.25 * position[None], flat, torch.zeros(1, 5, 5, dtype=torch.float64)).without_key_slope()
    assert_close(fixed.key_only, flat)
    assert_close(fixed.relative, -0.25 * position[None])


def test_key_only_part_leaves_the_recency_out():
    prior = goat_prior(3, num_frequencies=2, init="alibi")
    assert float(key_only_part(prior, 9).abs().max()) == 0.0
    assert float(split_prior(prior, 9).relative[0, 8]) < 0


def test_bad_arguments_say_what_is_wrong():
    with pytest.raises(ValueError, match="prior must have three parts; got 2"):
        split_prior(RecencyPrior(1) + RecencyPrior(1), 5)
    with pytest.raises(ValueError, match="length must be at least 1"):
        split_prior(trained_prior(), 0)
    with pytest.raises(ValueError, match="be at least 3 to fit a line; got 2"):
        split_prior(trained_prior(), 2).without_key_slope()
