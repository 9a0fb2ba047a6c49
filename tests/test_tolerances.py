"""The comparison that the tests trust fails when it should."""

import math

import pytest
import torch
from tolerances import TOLERANCE, assert_close, centre_rows, relative_error

ONES = torch.ones(3, 5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_it_passes_within_the_tolerance_and_fails_beyond(dtype):
    expected = torch.linspace(-1, 1, 7, dtype=torch.float64)
    step = torch.zeros(7, dtype=torch.float64)
    step[3] = TOLERANCE[dtype]  # where the value is zero, so that storing it in the dtype rounds nothing else
    near, far = (expected.to(dtype).double() + factor * step for factor in (0.9, 1.2))
    reference = expected.to(dtype).double()
    assert_close(near.to(dtype), reference)
    with pytest.raises(AssertionError, match=r"relative error .* exceeds"):
        assert_close(far.to(dtype), reference)


def test_one_wrong_entry_is_enough():
    wrong = ONES.clone()
    wrong[2, 4] += 1e-3
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(wrong, ONES)


def test_the_sign_and_the_direction_do_not_matter():
    assert relative_error(-ONES, ONES) == relative_error(ONES, -ONES) == 2.0


def test_errors_are_relative_to_large_numbers_and_absolute_to_small_ones():
    assert relative_error(1001 * ONES, 1000 * ONES) == pytest.approx(1e-3)
    assert relative_error(2e-3 * ONES, 1e-3 * ONES) == pytest.approx(1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_fails_on_either_side(bad):
    spoilt = ONES.clone()
    spoilt[0, 0] = bad
    with pytest.raises(AssertionError, match="actual is not finite"):
        assert_close(spoilt, spoilt)
    with pytest.raises(AssertionError, match="expected is not finite"):
        assert_close(ONES, spoilt)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5, 1), (5, 3)])
def test_shapes_that_would_broadcast_fail(shape):
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_close(torch.ones(shape), ONES)


def test_a_tolerance_of_its_own():
    assert_close(ONES + 0.01, ONES, tolerance=0.02)
    with pytest.raises(AssertionError, match=r"exceeds 1\.0e-03"):
        assert_close(ONES + 0.01, ONES, tolerance=1e-3)


def test_the_tolerance_is_that_of_the_actual_dtype():
    coarse = (ONES / 3).bfloat16()
    assert_close(coarse, ONES / 3)
    with pytest.raises(AssertionError):
        assert_close(coarse.float(), ONES / 3)


def test_a_dtype_without_a_tolerance_fails():
    with pytest.raises(KeyError):
        assert_close(torch.ones(3, dtype=torch.int64), torch.ones(3))


def test_tolerances_above_a_hundredth_need_a_reason():
    assert max(TOLERANCE.values()) <= 1e-2


def test_centring_removes_row_constants_and_nothing_else():
    matrix = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(2, 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close(centre_rows(matrix + 10 * rows), centre_rows(matrix))
    columns = torch.arange(5.0, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close(centre_rows(matrix + columns), centre_rows(matrix))
