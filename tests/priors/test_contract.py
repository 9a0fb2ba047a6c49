"""Every prior keeps the contract; and the contract notices priors that do not."""

import dataclasses

import pytest
import torch
from priors.cases import CASES, matrix, off_neutral
from torch import nn

from eotattn.priors import DensePrior, FourierPrior, GridPrior, RecencyPrior, grid_positions
from eotattn.testing import CHECKS, Case, _default_positions, check_prior


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_contract(name, check):
    make_prior, skipped = CASES[name]
    if check in skipped:
        pytest.skip("the prior holds data that its caller gave")
    CHECKS[check](Case(make_prior, *_default_positions(make_prior())))


@pytest.mark.parametrize("name", ["fourier", "recency", "sink", "table", "goat"])
def test_contract_at_an_offset(name):
    make_prior, _ = CASES[name]
    positions = {"query_positions": torch.arange(1001, 1006), "key_positions": torch.arange(997, 1004)}
    check_prior(make_prior, **positions, skip=["start"])  # the first-token term has no gradient without the first token


@pytest.mark.parametrize("name", ["fourier", "recency", "sink", "goat"])
def test_contract_of_one_token_and_of_scattered_positions(name):
    make_prior, _ = CASES[name]
    check_prior(
        make_prior,
        query_positions=torch.tensor([7]),
        key_positions=torch.tensor([5, 0, 3, 9, 1]),
    )


class Broken(RecencyPrior):
    """A prior with one fault, chosen by the test."""

    def __init__(self, num_heads=3):
        super().__init__(num_heads)
        with torch.no_grad():
            self.strength.copy_(torch.tensor([1.3, 0.4, 2.2]))


class WrongLanes(Broken):
    """States its dense form a second time, and differently."""

    def dense(self, query_positions, key_positions, *, dtype=torch.float32):
        return super().dense(query_positions, key_positions, dtype=dtype) * (1 + 1e-4)


class RoughWeights(Broken):
    def lanes(self, query_positions, key_positions, *, dtype, **options):
        """Writes a slope as one 16-bit number, and states the bound of two."""
        lanes = super().lanes(query_positions, key_positions, dtype=dtype, **options)
        return dataclasses.replace(lanes, query=torch.where(lanes.plan.query.piece > 0, 0, lanes.query))


class RoughPositions(Broken):
    def lanes(self, query_positions, key_positions, *, dtype, **options):
        """Writes a position as one 16-bit number, and states the bound of exact ones."""
        lanes = super().lanes(query_positions, key_positions, dtype=dtype, **options)
        is_rest = torch.tensor([bool(column.piece) for column in lanes.plan.key.columns])
        reads_rest = (lanes.plan.key.fixed[0] * is_rest[:, None]).any(0)
        return dataclasses.replace(lanes, key=torch.where(reads_rest, 0, lanes.key))


class Unshiftable(Broken):
    """Calls itself relative, so that positions may count from anywhere, and is not."""

    def key_features(self, positions):
        return super().key_features(positions.clamp(max=4))


class NotANumber(Broken):
    def key_features(self, positions):
        return super().key_features(positions.where(positions != 2, float("nan")))


class WrongShape(Broken):
    def dense(self, query_positions, key_positions, *, dtype=torch.float32):
        return super().dense(query_positions, key_positions, dtype=dtype).sum(-1, keepdim=True)


class ByCurrentLength(Broken):
    is_relative = False

    def key_features(self, positions):
        return super().key_features(positions / positions.max())


class DetachedLanes(Broken):
    def lanes(self, query_positions, key_positions, *, dtype, **options):
        lanes = super().lanes(query_positions, key_positions, dtype=dtype, **options)
        return dataclasses.replace(lanes, query=lanes.query.detach() + 0 * lanes.query)


class DeadStart(Broken):
    def coefficients(self):
        return 0 * super().coefficients()


class Castable(Broken):
    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)


class Forgetful(Broken):
    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.tensor(0.5), persistent=False)

    def coefficients(self):
        return super().coefficients() + self.offset.double()


class SharedMemory(Broken):
    def __deepcopy__(self, memo):
        return self


class HalfReset(Broken):
    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.full((3,), 0.5))

    def coefficients(self):
        return super().coefficients() + self.offset[:, None]


class StillTraining(Broken):
    def freeze(self):
        return self


class Unscalable(Broken):
    def __mul__(self, factor):
        return self

    __rmul__ = __mul__


class FloatScores(Broken):
    def score_mod(self, query_positions=None, key_positions=None):
        """Forgets the positions."""
        return super().score_mod()


class BatchBlind(Broken):
    def dense(self, query_positions, key_positions, *, dtype=torch.float32):
        query = query_positions[:1] if query_positions.dim() == 2 else query_positions
        return super().dense(query, key_positions, dtype=dtype)


@pytest.mark.parametrize(
    ("broken", "check", "message"),
    [
        (NotANumber, "dense", "NaN"),
        (WrongShape, "dense", "shape is"),
        (WrongLanes, "lanes", r"error .* in torch\.float64"),
        (RoughWeights, "lanes", r"error .* in torch\.bfloat16 exceeds the stated bound"),
        (Unshiftable, "lanes", r"error .* in torch\.float64"),
        (FloatScores, "score_mod", "score_mod and dense differ"),
        (BatchBlind, "batches", "both batched"),
        (ByCurrentLength, "chunks", "chunk"),
        (DetachedLanes, "gradients", "gradient of strength"),
        (DeadStart, "start", "can never learn"),
        (Castable, "moves", "changed dtypes"),
        (Forgetful, "state", "bit by bit"),
        (SharedMemory, "copies", "after spoiling deepcopy"),
        (Forgetful, "meta_device", "bit by bit"),
        (HalfReset, "reset", "bit by bit"),
        (StillTraining, "freeze", "trainable"),
        (Unscalable, "scale", "multiple of dense"),
    ],
)
def test_the_contract_notices(broken, check, message):
    case = Case(broken, *_default_positions(broken()))
    with pytest.raises(AssertionError, match=f"LogPrior contract, {check}: .*{message}"):
        CHECKS[check](case)


def test_the_contract_notices_an_exactness_that_does_not_hold():
    """Positions count from the middle of the keys; bfloat16 has no 699."""
    CHECKS["lanes"](Case(RoughPositions, torch.arange(4), torch.arange(8)))
    case = Case(RoughPositions, torch.arange(4), torch.tensor([0, 299, 1399]))
    with pytest.raises(AssertionError, match=r"error .* in torch\.bfloat16 exceeds the stated bound"):
        CHECKS["lanes"](case)


def test_skip_must_name_checks():
    with pytest.raises(ValueError, match="check_prior: skip must hold names of dense"):
        check_prior(lambda: RecencyPrior(3), skip=["lane"])


def test_a_constructor_must_give_a_prior():
    with pytest.raises(AssertionError, match="no LogPrior"):
        check_prior(lambda: nn.Linear(2, 2))


@pytest.mark.parametrize(
    "combined",
    [
        lambda given: given,
        lambda given: given + off_neutral(FourierPrior(3)),
        lambda given: 0.5 * given,
        lambda given: 0.5 * given + given,
    ],
    ids=["alone", "in a sum", "in a multiple", "in both"],
)
@pytest.mark.parametrize("outside", [-1, 11])
def test_a_given_matrix_refuses_positions_outside_wherever_it_sits(combined, outside):
    """Indexing would take a negative position from the end of the matrix, silently."""
    prior = combined(DensePrior(matrix()))
    inside, wrong = torch.tensor([0, 8]), torch.tensor([0, outside])
    prior.dense(inside, inside)
    with pytest.raises(ValueError, match="DensePrior: key_positions must lie in 0 to 10"):
        prior.dense(inside, wrong)
    with pytest.raises(ValueError, match="DensePrior: query_positions must lie in 0 to 8"):
        prior.dense(wrong, inside)


def test_a_given_matrix_refuses_positions_outside_on_an_axis_of_a_grid():
    prior = GridPrior(DensePrior(matrix()), DensePrior(matrix()))
    with pytest.raises(ValueError, match="DensePrior: query_positions must lie in 0 to 8; got '0 to 11'"):
        prior.dense(grid_positions(12, 2), grid_positions(2, 2))
