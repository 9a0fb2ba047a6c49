"""The kernels, tensors in and tensors out, against an independent float64 rewrite."""

import math

import pytest
import torch
from tolerances import assert_close

from eotattn.kernels import flex, reference, sdpa
from eotattn.kernels.append import append_plainly
from eotattn.priors.lane_sides import Side

B, H, Q, K, D, V, C, P = 2, 6, 5, 7, 9, 4, 2, 3


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def content(kv_heads=H, dtype=torch.float64):
    return (
        normal(B, H, Q, D, dtype=dtype),
        normal(B, kv_heads, K, D, seed=1, dtype=dtype),
        normal(B, kv_heads, K, V, seed=2, dtype=dtype),
    )


def oracle(query, key, value, scale, bias=None):
    """One query at a time, in float64, without any softmax function; rows without finite score are zero."""
    group = query.shape[1] // key.shape[1]
    output = torch.zeros(B, H, Q, V, dtype=torch.float64)
    weights = torch.zeros(B, H, Q, K, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            score = scale * torch.einsum("qd,kd->qk", query[b, h].double(), key[b, h // group].double())
            score = score if bias is None else score + bias[b, h].double()
            for q in range(Q):
                if score[q].isneginf().all():
                    continue
                mass = (score[q] - score[q].max()).exp()
                weights[b, h, q] = mass / mass.sum()
                output[b, h, q] = weights[b, h, q] @ value[b, h // group].double()
    return output, weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [6, 3, 1])
def test_reference(kv_heads, dtype):
    query, key, value = content(kv_heads, dtype)
    log_prior = normal(H, Q, K, seed=3)
    mask = normal(B, 1, Q, K, seed=4) > -0.8
    bias = (log_prior + torch.where(mask, 0.0, -math.inf)).expand(B, H, Q, K)
    expected, expected_weights = oracle(query, key, value, 0.3, bias)
    output, weights, _ = reference.attend(query, key, value, scale=0.3, log_prior=log_prior, mask=mask)
    assert output.dtype == dtype
    assert weights.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(output, expected)
    assert_close(weights, expected_weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("value_width", [4, 9, 15])
def test_sdpa_with_lanes(kv_heads, dtype, value_width):
    query, key, _ = content(kv_heads, dtype)
    value = normal(B, kv_heads, K, value_width, seed=2, dtype=dtype)
    scale = 0.3
    tables = normal(Q, C, seed=3, dtype=dtype), normal(B, K, C, seed=4, dtype=dtype)
    matrices = normal(H, C, P, seed=5, dtype=dtype) / scale, normal(kv_heads, C, P, seed=6, dtype=dtype)
    piece = torch.zeros(P, dtype=torch.int8)
    sides = [Side(table, matrix, piece, 1) for table, matrix in zip(tables, matrices, strict=True)]
    factors = torch.einsum("qc,hcp->hqp", tables[0], scale * matrices[0])
    features = torch.einsum("bkc,hcp->bhkp", tables[1], matrices[1]).repeat_interleave(H // kv_heads, dim=1)
    log_prior = factors @ features.mT
    expected, *_ = reference.attend(query, key, value, scale=scale, log_prior=log_prior)
    output = sdpa.attend(append_plainly(query, sides[0]), append_plainly(key, sides[1]), value, scale=scale)
    assert output.shape == (B, H, Q, value_width)
    assert_close(output, expected)


def test_sdpa_triangle_and_masks():
    query, key, value = content()
    triangle = torch.ones(Q, K, dtype=torch.bool).tril()
    expected, *_ = reference.attend(query, key, value, scale=0.3, mask=triangle)
    assert_close(sdpa.attend(query, key, value, scale=0.3, is_causal=True), expected)
    assert_close(sdpa.attend(query, key, value, scale=0.3, mask=triangle), expected)
    bias = normal(H, 1, K, seed=7)
    expected, *_ = reference.attend(query, key, value, scale=0.3, log_prior=bias)
    assert_close(sdpa.attend(query, key, value, scale=0.3, mask=bias), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_padding_lane_removes_padding_and_nothing_else(dtype):
    query, key, value = content(dtype=dtype)
    padding = torch.tensor([[False] * 5 + [True] * 2, [True] + [False] * 6])
    lane = sdpa.padding_lane(padding, dtype, scale=0.3)
    assert lane[1].isfinite().all()
    sides = append_plainly(query, None, lane[0]), append_plainly(key, None, lane[1])
    output = sdpa.attend(*sides, value, scale=0.3)
    expected, *_ = reference.attend(query, key, value, scale=0.3, mask=~padding[:, None, None, :])
    assert_close(output, expected)
    changed = value.masked_fill(padding[:, None, :, None], 1000.0)
    again = sdpa.attend(*sides, changed, scale=0.3)
    assert torch.equal(again, output)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64])
def test_kernel_width(width):
    assert sdpa.kernel_width(width, torch.device("cpu")) == width
    on_gpu = sdpa.kernel_width(width, torch.device("cuda"))
    assert on_gpu % 8 == 0
    assert width <= on_gpu < width + 8


@pytest.mark.parametrize(("width", "on_gpu"), [(65, 80), (80, 80), (104, 112), (128, 128), (141, 144)])
def test_wide_kernels_come_in_larger_steps(width, on_gpu):
    assert sdpa.kernel_width(width, torch.device("cuda")) == on_gpu


def test_reference_does_not_hide_nan():
    """A row of NaN is an error upstream, not a row without admissible keys."""
    query, key, value = content()
    query[1, 2, 3] = math.nan
    output, weights, _ = reference.attend(query, key, value, scale=0.3)
    assert output[1, 2, 3].isnan().all()
    assert weights[1, 2, 3].isnan().all()
    assert output[0].isfinite().all()


def test_flex_says_why_it_refuses():
    query = torch.zeros(1, 1, 2, 4)
    assert "cpu" in flex.refusal(query, mask=None, dropout_p=0.0, learned=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_against_the_reference():
    query, key, value = (x.cuda().float() for x in (normal(B, H, Q, 16), normal(B, 3, K, 16), normal(B, 3, K, 16)))
    mask = (normal(B, 1, Q, K, seed=4) > -0.8).cuda()
    expected, *_ = reference.attend(query, key, value, scale=0.3, mask=mask)
    seen = lambda b, h, q, k: mask[b, 0, q, k]  # noqa: E731
    assert_close(flex.attend(query, key, value, scale=0.3, pattern=flex.Pattern(seen, by_sample=True))[0], expected)
    assert flex.refusal(query, mask=mask, dropout_p=0.0, learned=False) is None
    assert "dropout" in flex.refusal(query, mask=None, dropout_p=0.1, learned=False)
    assert "additive" in flex.refusal(query, mask=mask.float(), dropout_p=0.0, learned=False)
    assert "float64" in flex.refusal(query.double(), mask=None, dropout_p=0.0, learned=False)
