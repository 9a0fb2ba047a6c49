"""Positions, and tables that are remembered: computed once, never stale."""

import threading

import pytest
import torch

from eotattn.attention import prior_attention
from eotattn.priors import BilinearPrior, FourierPrior, memory
from eotattn.priors.memory import MAX_VALUES, constants, remembered
from eotattn.priors.prior_positions import consecutive, pair_positions

CPU = torch.device("cpu")


def test_consecutive_positions_are_made_once():
    first = consecutive(3, 5, CPU)
    assert first.tolist() == [3, 4, 5, 6, 7]
    assert consecutive(3, 5, CPU) is first
    assert consecutive(-2, 3, CPU).tolist() == [-2, -1, 0]


def test_positions_pair_up_with_and_without_a_batch():
    one, two = torch.arange(5), torch.arange(7)
    shapes = [
        tuple(torch.broadcast_shapes(*(side.shape for side in pair_positions(*pair, 1))))
        for pair in ((one, two), (one[None], two), (one, two[None].expand(3, 7)))
    ]
    assert shapes == [(5, 7), (1, 1, 5, 7), (3, 1, 5, 7)]
    cells = torch.zeros(3, 5, 2), torch.zeros(7, 2)
    assert tuple(torch.broadcast_shapes(*(side.shape for side in pair_positions(*cells, 2)))) == (3, 1, 5, 7, 2)


def test_a_value_is_made_once_for_each_key_and_the_least_used_goes_first():
    made = []

    def value_of(key):
        return remembered(("a test", key), CPU, lambda: made.append(key) or torch.tensor(key))

    for key in (1, 2, 1):
        assert int(value_of(key)) == key
    assert made == [1, 2]
    for key in range(MAX_VALUES - 1):
        value_of(1)
        value_of(100 + key)
    assert len(memory._VALUES) <= MAX_VALUES
    made.clear()
    value_of(1)
    value_of(2)
    assert made == [2]


def test_constants_are_put_in_place_once_a_dtype():
    assert constants((1.0, 2.0), CPU).dtype == torch.float64
    assert constants((1.0, 2.0), CPU) is constants((1.0, 2.0), CPU)
    assert constants((1, 2), CPU, torch.int64).tolist() == [1, 2]
    assert constants((), CPU).shape == (0,)


def test_threads_share_what_is_remembered():
    values = []
    threads = [threading.Thread(target=lambda: values.append(constants((5.0, 6.0, 7.0), CPU))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(value.tolist() == [5.0, 6.0, 7.0] for value in values)


class Counting(BilinearPrior):
    """Counts the tokens whose key features are computed."""

    computed = 0

    def __init__(self):
        super().__init__(1)
        self.height = torch.nn.Parameter(torch.ones(1))

    def query_features(self, positions):
        return torch.ones_like(positions).unsqueeze(-1)

    def key_features(self, positions):
        Counting.computed += positions.numel()
        return positions.square().unsqueeze(-1)

    def weights(self):
        return self.height[:, None, None]


@pytest.mark.parametrize("first", [0, 5])
def test_a_training_step_at_the_same_positions_computes_no_feature(first):
    prior, at = Counting(), range(first, first + 9)
    content = torch.ones(1, 1, 9, 8)

    def step():
        output = prior_attention(
            content, content, content, prior=prior, query_positions=at, key_positions=at, backend="sdpa"
        )
        output.sum().backward()
        with torch.no_grad():
            prior.height.sub_(0.1)

    step()
    before = Counting.computed
    for _ in range(3):
        step()
    assert Counting.computed == before


def test_two_priors_of_equal_constants_share_one_table():
    at = range(11)
    content = torch.ones(1, 2, 11, 8)
    before = None
    for _ in range(2):
        prior = FourierPrior(2, 3, 4.0, 83.0)
        prior_attention(content, content, content, prior=prior, query_positions=at, key_positions=at, backend="sdpa")
        if before is not None:
            assert set(memory._VALUES) == before
        before = set(memory._VALUES)
