"""Argument checks: what they let through, what they stop, and the one wording."""

import math

import pytest
import torch

from eotattn.checks import (
    check_choice,
    check_floating,
    check_no_nan,
    check_positive,
    check_positive_int,
    check_same_device,
    check_shape,
    describe,
    require,
)

OWNER = "owner"


def test_the_wording():
    with pytest.raises(ValueError, match=r"^solve: epsilon must be positive; got -1\.0\. Pass a temperature\.$"):
        require(False, "solve", "epsilon", "be positive", -1.0, "Pass a temperature")
    require(True, "solve", "epsilon", "be positive", 1.0, "Pass a temperature")


def test_the_class_of_the_error():
    with pytest.raises(TypeError, match=r"^solve: epsilon must be a number; got 'one'"):
        require(False, "solve", "epsilon", "be a number", "one", "Pass a float", error=TypeError)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "shape (2, 3), torch.float64, cpu"),
        (torch.zeros((), device="meta"), "shape (), torch.float32, meta"),
        (torch.Size([2, 3]), "shape (2, 3)"),
        ("text", "'text'"),
        (None, "None"),
        ((1, 2), "(1, 2)"),
    ],
)
def test_describe(value, words):
    assert describe(value) == words


@pytest.mark.parametrize("value", [1, 3, 10**9])
def test_whole_numbers_pass(value):
    assert check_positive_int(OWNER, "n", value) == value


def test_a_minimum_of_zero():
    assert check_positive_int(OWNER, "n", 0, minimum=0) == 0
    with pytest.raises(ValueError, match="owner: n must be at least 0; got -1"):
        check_positive_int(OWNER, "n", -1, minimum=0)


@pytest.mark.parametrize("value", [0, -1])
def test_small_numbers_fail(value):
    with pytest.raises(ValueError, match=f"owner: n must be at least 1; got {value}. Pass a whole number from 1 up"):
        check_positive_int(OWNER, "n", value)


@pytest.mark.parametrize("value", [1.0, True, "1", None, torch.tensor(1)])
def test_what_is_no_integer_fails(value):
    with pytest.raises(TypeError, match="owner: n must be an integer"):
        check_positive_int(OWNER, "n", value)


@pytest.mark.parametrize(
    ("value", "options"),
    [(1, {}), (0.5, {}), (0.0, {"allow_zero": True}), (math.inf, {"allow_inf": True}), (1e-300, {})],
)
def test_positive_numbers_pass(value, options):
    number = check_positive(OWNER, "x", value, **options)
    assert isinstance(number, float)
    assert number == value


@pytest.mark.parametrize(
    ("value", "options", "rule"),
    [
        (0.0, {}, "be positive and finite"),
        (-0.1, {}, "be positive and finite"),
        (math.nan, {}, "be positive and finite"),
        (math.inf, {}, "be positive and finite"),
        (-1, {"allow_zero": True}, "be non-negative and finite"),
        (math.inf, {"allow_zero": True}, "be non-negative and finite"),
        (0.0, {"allow_inf": True}, "be positive"),
        (math.nan, {"allow_inf": True, "allow_zero": True}, "be non-negative"),
        (-math.inf, {"allow_inf": True}, "be positive"),
    ],
)
def test_numbers_out_of_range_fail(value, options, rule):
    with pytest.raises(ValueError, match=f"owner: x must {rule}; got"):
        check_positive(OWNER, "x", value, **options)


@pytest.mark.parametrize("value", ["1", None, True, torch.tensor(1.0), 1j])
def test_what_is_no_number_fails(value):
    with pytest.raises(TypeError, match="owner: x must be a number"):
        check_positive(OWNER, "x", value)


def test_choices():
    assert check_choice(OWNER, "mode", "a", ("a", "b")) == "a"
    with pytest.raises(ValueError, match="owner: mode must be one of 'a', 'b'; got 'c'"):
        check_choice(OWNER, "mode", "c", ("a", "b"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_floating_tensors_pass(dtype):
    tensor = torch.zeros(2, dtype=dtype)
    assert check_floating(OWNER, "x", tensor) is tensor


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_fail(dtype):
    with pytest.raises(TypeError, match=r"owner: x must have a floating dtype; got shape \(2,\), "):
        check_floating(OWNER, "x", torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("value", [[1.0], 1.0, None])
def test_what_is_no_tensor_fails(value):
    with pytest.raises(TypeError, match="owner: x must be a tensor; got <class"):
        check_floating(OWNER, "x", value)


def test_shapes():
    tensor = torch.zeros(2, 3)
    check_shape(OWNER, "x", tensor, (2, 3), "Transpose it")
    check_shape(OWNER, "x", tensor, (None, 3), "Transpose it")
    for wrong in ((3, 2), (2,), (2, 3, 1), (None,), ()):
        with pytest.raises(ValueError, match=r"owner: x must have shape .*; got shape \(2, 3\), .* Transpose it\."):
            check_shape(OWNER, "x", tensor, wrong, "Transpose it")
    with pytest.raises(ValueError, match=r"must have shape \(any, 4\)"):
        check_shape(OWNER, "x", tensor, (None, 4), "Transpose it")


def test_devices():
    here, there = torch.zeros(2), torch.zeros(2, device="meta")
    check_same_device(OWNER, ("x", here), y=here, z=None)
    with pytest.raises(ValueError, match=r"owner: z must be on the device of x \(cpu\); got .*meta. Move it with"):
        check_same_device(OWNER, ("x", here), y=here, z=there)


def test_finite_values():
    check_no_nan(OWNER, "x", torch.tensor([1.0, -2.0]))
    check_no_nan(OWNER, "x", torch.tensor([1.0, -math.inf]), allow_negative_inf=True)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="owner: x must be finite; got '2 such entries of 3'"):
            check_no_nan(OWNER, "x", torch.tensor([bad, 1.0, bad]))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"owner: x must hold no NaN and no \+inf; got '1 such entries of 2'"):
            check_no_nan(OWNER, "x", torch.tensor([bad, -math.inf]), allow_negative_inf=True)
