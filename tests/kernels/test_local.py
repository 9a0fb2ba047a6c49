"""Attention by blocks of a window, and document by document, against the reference under the mask they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from eotattn.kernels import local, packed, reference, sdpa, varlen

B, H, HK, D, V = 2, 4, 2, 5, 3


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def content(queries, keys, dtype=torch.float64):
    shapes = ((B, H, queries, D), (B, HK, keys, D), (B, HK, keys, V))
    return [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 130), st.integers(0, 150), st.integers(0, 3))
def test_any_length_window_and_offset(queries, window, offset, later):
    query, key, value = content(queries, queries + offset + later)
    lag = torch.arange(queries)[:, None] + offset - torch.arange(queries + offset + later)
    expected, *_ = reference.attend(query, key, value, scale=0.3, mask=(lag >= 0) & (lag < window))
    assert_close(local.attend(query, key, value, scale=0.3, window=window, offset=offset), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_windows_in_other_dtypes(dtype):
    query, key, value = content(200, 200, dtype)
    lag = torch.arange(200)[:, None] - torch.arange(200)
    expected, *_ = reference.attend(query, key, value, scale=0.3, mask=(lag >= 0) & (lag < 70))
    output = local.attend(query, key, value, scale=0.3, window=70)
    assert output.dtype == dtype
    assert_close(output, expected)


@pytest.mark.parametrize(("window", "length"), [(16, 1024), (100, 1000)])
def test_pairs_computed_grow_with_the_window(window, length, monkeypatch):
    """Counted where the fused call happens: not more than three windows a query, or three blocks if that is larger."""
    pairs, attend = [], sdpa.attend

    def counted(query, key, value, **named):
        pairs.append(query.shape[0] * query.shape[2] * key.shape[2])
        return attend(query, key, value, **named)

    monkeypatch.setattr(sdpa, "attend", counted)
    local.attend(*content(length, length), scale=0.3, window=window)
    assert sum(pairs) <= B * length * 3 * max(window, local.MIN_BLOCK)


def test_dropout_reaches_every_block():
    query, key, _ = content(300, 300)
    value = torch.ones(B, HK, 300, V, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = local.attend(query, key, value, scale=0.3, window=70, dropout_p=0.5)
    assert (dropped - 1).abs().amax(-1).gt(1e-3).double().mean() > 0.99
    assert abs(float(dropped.mean()) - 1) < 0.05


@pytest.mark.parametrize(("is_causal", "window"), [(False, None), (True, None), (True, 6)])
def test_documents_one_by_one(is_causal, window):
    lengths, length = (7, 1, 12, 20), 20
    query, key, value = content(length, length)
    ids = torch.arange(4).repeat_interleave(torch.tensor(lengths)).view(B, length)
    lag = torch.arange(length)[:, None] - torch.arange(length)
    mask = ids[:, None, :, None] == ids[:, None, None, :]
    mask = mask & (lag >= 0) if is_causal else mask
    mask = mask & (lag < window) if window else mask
    expected, *_ = reference.attend(query, key, value, scale=0.3, mask=mask)
    output = packed.attend(query, key, value, lengths=lengths, scale=0.3, is_causal=is_causal, window=window)
    assert_close(output, expected)


def test_varlen_says_why_it_refuses():
    query = torch.zeros(1, 1, 2, 4)
    assert "cpu" in varlen.refusal(query, dropout_p=0.0)
    on_gpu = torch.zeros(1, 1, 2, 4, device="meta", dtype=torch.bfloat16)
    assert "GPU" in varlen.refusal(on_gpu, dropout_p=0.0)
    assert "257 wide" in varlen.width_refusal(257)
    assert varlen.width_refusal(256) is None
