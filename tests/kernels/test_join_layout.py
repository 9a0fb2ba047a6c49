"""The plan of joined lanes: told in numbers, read back, and as wide as the lanes of the factors."""

import pytest
import torch

from eotattn.attention.joined import _layout
from eotattn.kernels.join_layout import PartShape, read_layout
from eotattn.priors import FourierPrior, RecencyPrior, SinkPrior, goat_prior

SHAPES = [
    PartShape(((0, 2), (1, 3)), (2, 2), True, 2, False, False, False, False),
    PartShape(((0,), (0,), (0,)), (1,), True, 3, True, True, True, True),
    PartShape(((0, 1, 2),), (1, 1, 1), False, 3, True, False, False, False),
]


def test_a_layout_is_read_from_the_numbers_that_tell_it():
    numbers = tuple(number for shape in SHAPES for number in shape.numbers())
    scales = tuple(float(n) for n in range(12))
    layout = read_layout(numbers, scales, 4, 2)
    assert layout.parts == tuple(SHAPES)
    assert layout.scales == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11))
    assert (layout.group, layout.num_heads) == (2, 4)
    assert read_layout(numbers, scales, 4, 2) is layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize(
    "prior",
    [goat_prior(6, num_frequencies=3), RecencyPrior(6), 0.5 * FourierPrior(6, 2) + SinkPrior(6, 0)],
    ids=["goat", "recency", "multiple"],
)
def test_joined_lanes_are_as_many_as_those_of_the_factors(prior, kv_heads, dtype):
    positions = torch.arange(3)
    lanes = prior.lanes(positions, positions, dtype=dtype).grouped(kv_heads)
    assert _layout(prior.expansions(dtype), kv_heads, dtype).num_lanes == lanes.num_lanes


def test_equal_priors_share_a_layout():
    first, second = (_layout(goat_prior(4).expansions(torch.bfloat16), 4, torch.bfloat16) for _ in range(2))
    assert first is second
    assert _layout((0.5 * goat_prior(4)).expansions(torch.bfloat16), 4, torch.bfloat16) is not first
