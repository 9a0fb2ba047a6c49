"""The variable-length backend, PyTorch's function replaced by its documentation as loops; on a GPU the function itself.

What PyTorch documents: tokens (T, H, D) of all sequences, int32 offsets, and a window (left, right) in which a query
sees ``left`` keys before its own place and ``right`` after it, places counted from the last key of its sequence.
"""

import math

import pytest
import torch
from attention.oracles import normal
from priors.cases import off_neutral
from tolerances import assert_close, relative_error

from eotattn.attention import KeyValueCache, PackedDocuments, explain, prior_attention
from eotattn.kernels import varlen
from eotattn.priors import RecencyPrior, goat_prior

B, H, HK, L, D = 2, 4, 2, 24, 8
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """softmax over each sequence alone, one head at a time."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.shape[-1] == key.shape[-1] == value.shape[-1], "the flash kernel wants equal widths"
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == int(cu_seq_k.diff().max())
    left, right = (math.inf if size == -1 else size for size in window_size)
    output, group = torch.zeros_like(query), query.shape[1] // key.shape[1]
    for n in range(len(cu_seq_q) - 1):
        queries, keys = slice(cu_seq_q[n], cu_seq_q[n + 1]), slice(cu_seq_k[n], cu_seq_k[n + 1])
        q, k, v = query[queries], key[keys], value[keys]
        place = torch.arange(len(q)) + len(k) - len(q)
        lag = place[:, None] - torch.arange(len(k))
        seen = (lag <= left) & (-lag <= right)
        for h in range(query.shape[1]):
            score = (scale * q[:, h] @ k[:, h // group].T).masked_fill(~seen, -math.inf)
            output[queries, h] = torch.softmax(score, -1) @ v[:, h // group]
    return output


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(varlen, "_varlen_attn", lambda: documented)
    monkeypatch.setattr(varlen, "_takes_groups", lambda: True)
    monkeypatch.setattr(varlen, "refusal", lambda *_, **__: None)


def goat():
    return off_neutral(goat_prior(H, num_frequencies=2, length_scale=16.0))


PADDING = torch.zeros(B, L, dtype=torch.bool)
PADDING[0, 20:] = PADDING[1, :3] = True
CALLS = {
    "everything": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 5},
    "documents": {"documents": PackedDocuments([10, 14, 1, 23])},
    "causal documents": {"documents": PackedDocuments([10, 14, 1, 23]), "is_causal": True},
    "windows of documents": {"documents": PackedDocuments([10, 14, 1, 23]), "is_causal": True, "window": 5},
    "padding": {"key_padding_mask": PADDING, "is_causal": True},
    "padding in a window": {"key_padding_mask": PADDING, "is_causal": True, "window": 5},
}
CHUNKS = {"chunk": (10, 24), "window of a chunk": (10, 24), "chunk with later keys": (5, 20)}


@pytest.mark.parametrize("value_width", [8, 5])
@pytest.mark.parametrize("with_prior", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_it_equals_the_reference(stand_in, name, with_prior, value_width):
    content = [normal(B, h, L, w, seed=h + w) for h, w in ((H, D), (HK, D), (HK, value_width))]
    arguments = {**CALLS[name], "prior": goat() if with_prior else None}
    expected = prior_attention(*content, **arguments, backend="reference")
    assert_close(prior_attention(*content, **arguments, backend="varlen"), expected)


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_need_no_mask(stand_in, name):
    start, stop = CHUNKS[name]
    query, key, value = (normal(B, h, L, D, seed=h) for h in (H, HK, HK))
    arguments = {"prior": goat(), "is_causal": True, "query_positions": range(start, stop)}
    arguments["window"] = 7 if name.startswith("window") else None
    expected = prior_attention(query[:, :, start:stop], key, value, **arguments, backend="reference")
    assert_close(prior_attention(query[:, :, start:stop], key, value, **arguments, backend="varlen"), expected)


def test_auto_takes_it_where_there_is_something_to_skip(stand_in):
    content = [normal(B, h, L, D, seed=h) for h in (H, HK, HK)]
    taken = {name: explain(*content, **arguments).backend for name, arguments in CALLS.items()}
    assert taken == {name: "sdpa" if name in ("everything", "causal", "padding") else "varlen" for name in CALLS}


def test_chunked_prefill_with_a_cache(stand_in):
    prior, content = goat(), [normal(B, h, L, D, seed=h) for h in (H, HK, HK)]
    expected = prior_attention(*content, prior=prior, is_causal=True, backend="reference")
    cache = KeyValueCache(B, HK, L, D, D, prior=prior, dtype=torch.float64)
    with torch.no_grad():
        parts = [
            prior_attention(*chunk, prior=prior, is_causal=True, cache=cache)
            for chunk in zip(*(side.split([9, 8, 7], dim=2) for side in content), strict=True)
        ]
    assert_close(torch.cat(parts, dim=2), expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("kv_heads", "value_width"), [(4, 8), (2, 8), (1, 8), (2, 40)])
def test_it_is_asked_for_the_width_that_it_gets(stand_in, kv_heads, value_width, padded, monkeypatch):
    """Shared key heads and padding take lanes too: a call that is let through must fit the kernel."""
    asked, given, attend = [], [], varlen.attend
    monkeypatch.setattr(varlen, "width_refusal", asked.append)

    def watched(query, key, value, **named):
        given.append(max(query.shape[-1], value.shape[-1]))
        return attend(query, key, value, **named)

    monkeypatch.setattr(varlen, "attend", watched)
    content = [normal(B, h, L, w, seed=h) for h, w in ((H, D), (kv_heads, D), (kv_heads, value_width))]
    padding = PADDING if padded else None
    prior_attention(*content, prior=goat(), is_causal=True, key_padding_mask=padding, backend="varlen")
    assert asked == given


def test_it_says_why_it_refuses():
    content = [normal(B, h, L, D, seed=h).float() for h in (H, HK, HK)]
    with pytest.raises(NotImplementedError, match="backend 'varlen' cannot serve this call with no prior: it is a GPU"):
        prior_attention(*content, backend="varlen")


def test_it_says_that_it_takes_no_mask_of_pairs(stand_in):
    content = [normal(B, h, L, D, seed=h).float() for h in (H, HK, HK)]
    mask = torch.ones(L, L, dtype=torch.bool)
    assert "no mask of pairs" in explain(*content, attn_mask=mask, backend="varlen").reason


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_on_a_gpu_as_exact_as_plain_attention(name, dtype):
    """Output and gradients against float64, in units of what the same call without a prior is off by."""
    arguments = {key: value.cuda() if torch.is_tensor(value) else value for key, value in CALLS[name].items()}
    prior, upstream = RecencyPrior(H).cuda(), normal(B, H, L, 64, seed=9).cuda()
    errors = []
    for given in (None, prior):
        content = [normal(B, h, L, 64, seed=h, dtype=dtype).cuda().requires_grad_() for h in (H, HK, HK)]
        exact = [side.detach().double().requires_grad_() for side in content]
        output = prior_attention(*content, prior=given, backend="varlen", **arguments)
        expected = prior_attention(*exact, prior=given, backend="reference", **arguments)
        found = torch.autograd.grad(output, content, upstream.to(dtype))
        truth = torch.autograd.grad(expected, exact, upstream)
        errors.append([relative_error(a, b) for a, b in zip((output, *found), (expected, *truth), strict=True)])
    for plain, ours in zip(*errors, strict=True):
        assert ours <= 2 * plain + 1e-3
