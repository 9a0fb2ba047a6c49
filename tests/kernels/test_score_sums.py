"""Sums over rows, columns and lags against dense float64 ones.

The kernels need a GPU, or Triton with ``TRITON_INTERPRET=1`` for its interpreter on a CPU.
"""

import dataclasses
import math
import os

import pytest
import torch
from score_oracle import admissible, dense_column_sums, dense_row_sums, make_tiles
from tolerances import assert_close, relative_error

from eotattn.kernels.score_sums import column_sums, refusal, row_sums
from eotattn.kernels.score_tiles import ScoreTiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
BOUND = 1e-4
#: Name -> sizes (B, H, Hk, Q, K, D) and options.
CASES = {
    "causal": ((1, 2, 2, 70, 70, 16), {"is_causal": True}),
    "full, unequal": ((2, 2, 1, 33, 150, 24), {}),
    "one query": ((2, 4, 2, 1, 131, 16), {"is_causal": True, "shift": 130}),
    "window behind a cache": ((1, 4, 2, 140, 200, 32), {"is_causal": True, "shift": 60, "window": 50}),
    "window, not causal": ((1, 1, 1, 130, 140, 16), {"window": 30}),
    "queries before all keys": ((1, 1, 1, 150, 80, 32), {"is_causal": True, "shift": -20}),
    "soft cap": ((1, 2, 2, 70, 130, 16), {"softcap": 2.0, "is_causal": True, "shift": 60}),
    "lanes": ((2, 4, 2, 70, 70, 16), {"lanes": 5, "is_causal": True}),
    "padding": ((2, 2, 2, 130, 130, 16), {"padded": True, "is_causal": True}),
    "everything": (
        (2, 4, 2, 90, 130, 16),
        {"lanes": 5, "softcap": 3.0, "padded": True, "is_causal": True, "shift": 40, "window": 70},
    ),
    "width 80": ((1, 1, 1, 40, 40, 80), {"is_causal": True}),
    "width 128": ((1, 1, 1, 40, 40, 128), {"is_causal": True, "lanes": 100}),
}
kernel = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter"),
]


def served(name, dtype=torch.float32, **options):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies the bit patterns of bfloat16")
    sizes, more = CASES[name]
    tiles = make_tiles(sizes, dtype, device=DEVICE, **more, **options)
    assert refusal(tiles) is None
    return tiles


def with_kernel(function):
    for mark in kernel:
        function = mark(function)
    return function


@with_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_row_sums(name, dtype):
    tiles = served(name, dtype)
    chosen = torch.arange(2, 2 + tiles.query.shape[0], device=DEVICE) * 9
    found, expected = row_sums(tiles, chosen), dense_row_sums(tiles, chosen)
    for field in dataclasses.fields(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        defined = expected.log_sum_exp.isfinite() & theirs.isfinite()
        if field.name != "prior_log_sum_exp" or tiles.query_lanes is not None:
            assert defined.any()
            assert_close(ours[defined].double(), theirs[defined], tolerance=BOUND)


@with_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_column_and_lag_sums(name, dtype):
    tiles = served(name, dtype)
    counted = torch.rand(tiles.query.shape[0], tiles.query.shape[2], generator=torch.Generator().manual_seed(1)) < 0.8
    counted = counted.to(DEVICE)
    lse = dense_row_sums(tiles, torch.zeros(tiles.query.shape[0], dtype=torch.int64)).log_sum_exp.float()
    found, expected = column_sums(tiles, lse, counted), dense_column_sums(tiles, lse, counted)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float64
        assert_close(ours, theirs, tolerance=BOUND)
    assert_close(found[0].sum(-1), found[1].sum(-1), tolerance=1e-6)


@with_kernel
def test_the_comparison_can_fail():
    tiles = served("causal")
    other = dataclasses.replace(tiles, scale=1.01 * tiles.scale)
    chosen = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    found, expected = row_sums(other, chosen), dense_row_sums(tiles, chosen)
    for name in ("log_sum_exp", "entropy", "participation", "expected_score", "score_max", "rival"):
        defined = getattr(expected, name).isfinite()
        assert relative_error(getattr(found, name)[defined].double(), getattr(expected, name)[defined]) > BOUND


@with_kernel
def test_large_logits_stay_within_the_bound():
    tiles = served("causal", scale=20.0)
    chosen = torch.full((1,), -1, device=DEVICE)
    found, expected = row_sums(tiles, chosen), dense_row_sums(tiles, chosen)
    assert expected.score_max.max() > 300
    for name in ("log_sum_exp", "entropy", "participation"):
        assert_close(getattr(found, name).double(), getattr(expected, name), tolerance=BOUND)


@with_kernel
def test_sums_of_shared_keys_do_not_depend_on_who_comes_first():
    tiles = served("padding")
    counted = torch.ones(tiles.query.shape[:1] + tiles.query.shape[2:3], dtype=torch.bool, device=DEVICE)
    lse = torch.where(admissible(tiles).any(-1), 3.0, -math.inf).expand(tiles.query.shape[:3]).contiguous()
    runs = [column_sums(tiles, lse, counted) for _ in range(3)]
    for mass, lags in runs[1:]:
        assert torch.equal(mass, runs[0][0])
        assert torch.equal(lags, runs[0][1])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves CPU tensors")
def test_what_is_not_served_says_why():
    side = torch.zeros(1, 1, 2, 4)
    assert refusal(ScoreTiles(side, side, scale=1.0)) == "the tensors are on cpu; the kernel runs on CUDA"


@with_kernel
def test_dtypes_and_sizes_that_are_not_served_are_named():
    side = torch.zeros(1, 1, 2, 4, device=DEVICE)
    assert "float64" in refusal(ScoreTiles(side.double(), side.double(), scale=1.0))
    wide = torch.zeros(1, 1, 2, 130, device=DEVICE)
    assert "width 130" in refusal(ScoreTiles(wide, wide, scale=1.0))
    many = torch.zeros(1, 1, 2, 4, device=DEVICE).expand(65536, -1, -1, -1)
    assert refusal(ScoreTiles(many, many, scale=1.0)) == "65536 heads of all samples; a launch holds 65535"
    assert "130 lanes" in refusal(ScoreTiles(side, side, scale=1.0, query_lanes=wide, key_lanes=wide))
