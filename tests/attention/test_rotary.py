"""Rotary content against an independent rewrite with complex numbers in float64."""

import pytest
import torch
from attention.oracles import attention, causal, normal
from tolerances import assert_close

from eotattn.attention import Rotary, prior_attention

B, H, L = 2, 3, 7


def turned(content, positions, *, base=10_000.0, width=None):
    """Each pair (r, r + width / 2) is one complex number, turned by exp(i position base^(-2 r / width))."""
    content = content.double()
    width = content.shape[-1] if width is None else width
    half = width // 2
    pairs = torch.complex(content[..., :half], content[..., half:width])
    r = torch.arange(half, dtype=torch.float64)
    angle = positions.double()[..., None] * torch.exp(
        -torch.log(torch.tensor(base, dtype=torch.float64)) * 2 * r / width
    )
    angle = angle if positions.dim() == 1 else angle[:, None]
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag, content[..., width:]], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [10_000.0, 50.0])
def test_rotation(dtype, base):
    content, positions = normal(B, H, L, 10, dtype=dtype), torch.tensor([0, 3, 1, 131_072, 9, 500, 2])
    output = Rotary(10, base=base)(content, positions)
    assert output.dtype == dtype
    # float64 itself rounds a phase of 131 072 radians to 1.5e-11
    assert_close(output, turned(content, positions, base=base), tolerance=5e-11 if dtype == torch.float64 else None)


def test_positions_of_every_sample():
    content, positions = normal(B, H, L, 10), torch.stack([torch.arange(L), torch.arange(L) + 40])
    assert_close(Rotary(10)(content, positions), turned(content, positions))


@pytest.mark.parametrize("width", [2, 6, 10])
def test_partial_rotation_leaves_the_rest(width):
    content, positions = normal(B, H, L, 11), torch.arange(L) + 5
    output = Rotary(11, rotary_width=width)(content, positions)
    assert_close(output, turned(content, positions, width=width))
    assert torch.equal(output[..., width:], content[..., width:])


@pytest.mark.parametrize("factor", [4.0, 1.7])
def test_interpolation_divides_positions(factor):
    content, positions = normal(B, H, L, 10), torch.arange(L) * 16
    output = Rotary(10, interpolation=factor)(content, positions)
    assert_close(output, turned(content, positions / torch.tensor(factor, dtype=torch.float64)))
    if factor == 4.0:
        assert_close(output, Rotary(10)(content, torch.arange(L) * 4))


def test_scores_depend_on_the_lag_alone():
    rotary, query, key = Rotary(10), normal(B, H, L, 10), normal(B, H, L, 10, seed=1)

    def score(offset):
        positions = torch.arange(L) + offset
        return rotary(query, positions) @ rotary(key, positions).transpose(-1, -2)

    assert_close(score(1000), score(0))
    assert_close(score(0).diagonal(dim1=-2, dim2=-1), (query * key).sum(-1))
    assert (score(0) - query @ key.transpose(-1, -2)).abs().max() > 0.1


def test_norms_are_kept_and_gradients_turn_back():
    rotary, content, positions = Rotary(10), normal(B, H, L, 10).requires_grad_(), torch.arange(L)
    output = rotary(content, positions)
    assert_close(output.square().sum(-1), content.square().sum(-1))
    weight = normal(B, H, L, 10, seed=4)
    (gradient,) = torch.autograd.grad((weight * output).sum(), content)
    assert_close(gradient, turned(weight, -positions))


def test_attention_with_rotary_content():
    rotary, positions = Rotary(10), torch.arange(L)
    query, key, value = normal(B, H, L, 10), normal(B, H, L, 10, seed=1), normal(B, H, L, 4, seed=2)
    expected, _ = attention(
        turned(query, positions), turned(key, positions), value, allowed=causal(positions, positions)
    )
    output = prior_attention(rotary(query, positions), rotary(key, positions), value, is_causal=True)
    assert_close(output, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"width": 1}, ValueError, "Rotary: width must be at least 2"),
        ({"width": 7}, ValueError, "rotary_width must be even and at most 7; got 7"),
        ({"width": 8, "rotary_width": 3}, ValueError, "rotary_width must be even"),
        ({"width": 8, "rotary_width": 10}, ValueError, "at most 8"),
        ({"width": 8, "base": 0.0}, ValueError, "base must be positive"),
        ({"width": 8, "interpolation": -2.0}, ValueError, "interpolation must be positive"),
        ({"width": 8.0}, TypeError, "width must be an integer"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        Rotary(**arguments)
