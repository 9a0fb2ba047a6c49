"""Drains, kinds of sinks and massive activations, against loops over the definitions."""

import math

import pytest
import torch
from tolerances import assert_close

from eotattn.diagnostics.values import (
    is_dormant,
    massive_activations,
    matrix_entropy,
    sink_kind,
    stable_rank,
    value_drain,
)


def test_value_drain_is_the_norm_of_the_projected_value():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 2, 5, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 4 * 3, generator=generator, dtype=torch.float64)
    drain = value_drain(value, weight)
    for h in range(4):
        projected = value[:, h // 2] @ weight[:, 3 * h : 3 * h + 3].mT
        assert_close(drain[:, h], projected.norm(dim=-1), tolerance=1e-10)
    with pytest.raises(ValueError, match=r"value_drain: output_weight must have shape \(E, multiple of 6\)"):
        value_drain(value, weight[:, :7])


def test_kinds_of_sinks():
    weights = torch.full((1, 4, 10, 5), 0.05)
    weights[..., 0] = 0.8
    weights[0, 3] = 0.2
    drain = torch.ones(1, 4, 5)
    drain[0, 0, 0], drain[0, 2, 0] = 0.1, 0.3
    output = torch.ones(1, 4, 10, 6)
    assert sink_kind(weights, drain, output) == [["no-operation", "broadcast", "other", "none"]]
    spread = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    assert sink_kind(weights, drain, spread)[0][1] == "other"


def test_stable_rank_and_matrix_entropy():
    x = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    assert stable_rank(x).item() == pytest.approx(5 / 4)
    p = (4 / 5, 1 / 5)
    assert matrix_entropy(x).item() == pytest.approx(-sum(q * math.log(q) for q in p))
    assert matrix_entropy(torch.ones(4, 6, dtype=torch.float64)).item() == pytest.approx(0, abs=1e-9)


def test_dormant_heads_and_massive_activations():
    output = torch.ones(1, 3, 4, 2)
    output[0, 2] *= 0.01
    assert is_dormant(output).tolist() == [[False, False, True]]
    hidden = torch.full((2, 6, 8), 0.05)
    hidden[1, 0, 3] = 150.0
    hidden[0, 1, 1] = 90.0  # large for the median, but below the absolute threshold
    assert massive_activations(hidden).tolist() == [[1, 0, 3]]
    assert massive_activations(hidden, size=50.0).tolist() == [[0, 1, 1], [1, 0, 3]]
