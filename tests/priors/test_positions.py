"""Positions that are remembered: shared between calls, and never stale."""

import torch

from eotattn.priors import FourierPrior, RecencyPrior
from eotattn.priors.positions import consecutive, run_table

CPU = torch.device("cpu")


def test_consecutive_positions_share_memory_and_grow():
    first, longer = consecutive(0, 5, CPU), consecutive(2, 3, CPU)
    assert first[2:].data_ptr() == longer.data_ptr()
    assert consecutive(3, 5000, CPU).tolist() == list(range(3, 5003))
    assert consecutive(-2, 3, CPU).tolist() == [-2, -1, 0]


def test_a_table_is_computed_once_for_all_lengths_that_it_covers():
    calls, name = [], object()

    def squares(positions):
        calls.append(positions.shape[0])
        return positions.double().square()

    for last in (7, 12, 900):
        table = run_table(name, last, CPU, squares)
        assert torch.equal(table[:last], torch.arange(last).double().square())
    assert len(calls) == 1
    longer = 4 * calls[0]
    assert torch.equal(run_table(name, longer, CPU, squares)[:longer], torch.arange(longer).double().square())
    assert len(calls) == 2


def test_writing_into_shared_positions_spoils_nobody_else():
    consecutive(0, 9, CPU).add_(1)
    assert consecutive(0, 9, CPU).tolist() == list(range(9))
    positions = consecutive(0, 9, CPU)
    before = run_table("doubled", 9, CPU, lambda p: 2 * p).clone()
    positions.mul_(3)
    assert torch.equal(run_table("doubled", 9, CPU, lambda p: 2 * p)[:9], before[:9])
    fresh = FourierPrior(1, 2, 4.0, 16.0).dense(consecutive(0, 9, CPU), consecutive(0, 9, CPU))
    assert torch.equal(fresh, FourierPrior(1, 2, 4.0, 16.0).dense(torch.arange(9), torch.arange(9)))
    assert RecencyPrior(1).dense(consecutive(0, 2, CPU), consecutive(0, 2, CPU))[0, 0, 1] > 0
