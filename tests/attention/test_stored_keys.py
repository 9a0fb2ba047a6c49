"""Stored keys carry their lanes: in 8 bits, whose error is measured, and in pages, which need nothing more."""

import warnings

import pytest
import torch
from attention.oracles import normal
from priors.cases import off_neutral
from tolerances import assert_close
from torch.nn.attention.experimental._paged_attention import PagedAttention
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from eotattn.attention import KeyValueCache, StaticCache, prior_attention
from eotattn.priors import goat_prior

B, H, HK, D, LENGTH = 2, 4, 2, 64, 160
#: Mean and largest total variation of the weights, and relative error of the output. Measured 2.0e-3, 2.8e-3, 7.1e-3
#: and 9.9e-3, 1.4e-2, 3.5e-2.
BOUNDS = {torch.int8: (0.006, 0.01, 0.02), torch.float8_e4m3fn: (0.03, 0.05, 0.1)}


def content(dtype=torch.float32):
    return [normal(B, heads, LENGTH, D, seed=heads + n, dtype=dtype) for n, heads in enumerate((H, HK, HK))]


def attended(cache, sides, prior):
    with torch.no_grad():
        call = {"prior": prior, "cache": cache, "is_causal": True}
        prior_attention(*(side[:, :, :-1] for side in sides), **call)
        weights = prior_attention(*(side[:, :, -1:] for side in sides), **call, return_weights=True)[1]
        cache.crop(LENGTH - 1)
        return weights.double(), prior_attention(*(side[:, :, -1:] for side in sides), **call).double()


@pytest.mark.parametrize("kind", [KeyValueCache, StaticCache])
@pytest.mark.parametrize("store", BOUNDS)
def test_the_error_of_eight_bits(store, kind):
    prior, sides = off_neutral(goat_prior(H, num_frequencies=2, length_scale=30.0)), content()
    sizes = (B, HK, LENGTH, D, D)
    plain = attended(KeyValueCache(*sizes, prior=prior), sides, prior)
    cache = kind(*sizes, prior=prior, store=store)
    weights, output = attended(cache, sides, prior)
    distance = 0.5 * (weights - plain[0]).abs().sum(-1)
    error = float((output - plain[1]).norm() / plain[1].norm())
    mean, largest, relative = BOUNDS[store]
    assert 0 < distance.mean() <= mean
    assert distance.max() <= largest
    assert 0 < error <= relative
    assert cache._keys.tensors()[1].dtype == torch.int8


@pytest.mark.parametrize("store", BOUNDS)
def test_a_row_is_off_by_as_much_as_is_said(store):
    _, key, value = content()
    key = key * normal(B, HK, LENGTH, 1, seed=9, dtype=torch.float32).exp()
    cache = KeyValueCache(B, HK, LENGTH, D, D, store=store)
    cache.append(key, value)
    largest = key.abs().amax(-1, keepdim=True)
    bound = largest / 254 if store == torch.int8 else (key.abs() / 16).clamp(min=largest * 2.0**-18)
    assert ((cache.keys - key).abs() <= bound * (1 + 1e-5)).all()
    assert (cache.keys != key).any()


@pytest.mark.parametrize("store", BOUNDS)
def test_lanes_are_kept_as_they_are(store):
    """Content that 8 bits hold exactly leaves the prior alone, which then must be exact."""
    prior = off_neutral(goat_prior(H, num_frequencies=2, length_scale=30.0)).double()
    sides = [torch.zeros_like(side) for side in content(torch.float64)[:2]] + [torch.ones(B, HK, LENGTH, D).double()]
    sides[2][:, :, ::2] = -1.0
    with torch.no_grad():
        cache = KeyValueCache(B, HK, LENGTH, D, D, prior=prior, dtype=torch.float64, store=store)
        found = [
            prior_attention(*(x[:, :, s] for x in sides), prior=prior, cache=cache, is_causal=True)
            for s in (slice(0, 90), slice(90, 91), slice(91, LENGTH))
        ]
        expected = prior_attention(*sides, prior=prior, is_causal=True)
    assert_close(torch.cat(found, dim=2), expected, tolerance=1e-7)  # scales are float32


@torch.no_grad()
def test_pages_of_keys_need_nothing_special():
    """PyTorch's own pages and kernel: keys with lanes, scattered over pages, are attended to as they are."""
    prior, (query, key, value) = off_neutral(goat_prior(H, num_frequencies=2)), content(torch.float64)
    at, size = torch.arange(LENGTH), 32
    lanes = prior.lanes(at, at, dtype=torch.float64, num_kv_heads=HK, query_scale=D**0.5)
    query, key = (
        torch.cat([x, y.expand(*x.shape[:-1], -1)], dim=-1) for x, y in ((query, lanes.query), (key, lanes.key))
    )
    pages = PagedAttention(B * (LENGTH // size) + 3, size, B, device="cpu")
    slots = pages.n_pages * size
    stored = [torch.zeros(1, HK, slots, side.shape[-1], dtype=side.dtype) for side in (key, value)]
    for start in range(0, LENGTH, size):  # sample by sample, so that no sample's pages lie in a row
        for sample in reversed(range(B)):
            index = torch.tensor([sample])
            pages.reserve(index, torch.tensor([start + size]))
            new = [side[sample : sample + 1, :, start : start + size] for side in (key, value)]
            pages.assign(index, at[None, start : start + size], *new, *stored)
    causal = lambda b, h, q, k: q >= k  # noqa: E731
    blocks = create_block_mask(causal, B, 1, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=size)
    paged = pages.convert_logical_block_mask(blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that eager calls are slow
        found = flex_attention(query, *stored, block_mask=paged, scale=D**-0.5, enable_gqa=True)
    first = pages.page_table[0, : LENGTH // size]
    assert (first.diff() != 1).any(), "pages lie in order, so that this test says little"
    assert_close(found, prior_attention(*content(torch.float64), prior=prior, is_causal=True))
