"""Positions that are remembered: shared between calls, and never stale."""

import torch

from eotattn.priors import FourierPrior, RecencyPrior
from eotattn.priors.positions import consecutive, tabulated

CPU = torch.device("cpu")


def test_consecutive_positions_share_memory_and_grow():
    first, longer = consecutive(0, 5, CPU), consecutive(2, 3, CPU)
    assert first[2:].data_ptr() == longer.data_ptr()
    assert consecutive(3, 5000, CPU).tolist() == list(range(3, 5003))
    assert consecutive(-2, 3, CPU).tolist() == [-2, -1, 0]


def test_a_table_is_computed_once_and_sliced():
    calls = []

    def squares(positions):
        calls.append(positions.shape[0])
        return positions.double().square()

    name = object()
    for span in ((0, 7), (3, 9)):
        positions = consecutive(*span, CPU)
        assert torch.equal(tabulated(name, positions, squares), positions.double().square())
    assert len(calls) == 1
    other = torch.arange(4)
    assert torch.equal(tabulated(name, other, squares), other.double().square())
    assert calls[-1] == 4


def test_writing_into_shared_positions_spoils_nobody_else():
    consecutive(0, 9, CPU).add_(1)
    assert consecutive(0, 9, CPU).tolist() == list(range(9))
    positions = consecutive(0, 9, CPU)
    before = tabulated("doubled", positions, lambda p: 2 * p).clone()
    positions.mul_(3)
    assert torch.equal(tabulated("doubled", positions, lambda p: 2 * p), 3 * before)
    fresh = FourierPrior(1, 2, 4.0, 16.0).dense(consecutive(0, 9, CPU), consecutive(0, 9, CPU))
    assert torch.equal(fresh, FourierPrior(1, 2, 4.0, 16.0).dense(torch.arange(9), torch.arange(9)))
    assert RecencyPrior(1).dense(consecutive(0, 2, CPU), consecutive(0, 2, CPU))[0, 0, 1] > 0
