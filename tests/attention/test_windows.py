"""Causal windows: the same as a band mask, in any form of the call, without a Q x K tensor."""

import pytest
import torch
from attention.oracles import attention, normal
from priors.cases import off_neutral
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from eotattn.attention import KeyValueCache, PriorAttention, prior_attention
from eotattn.priors import RelativeBiasPrior, goat_prior

B, H, HK, L, D, V = 2, 6, 3, 203, 8, 5
WINDOWS = [1, 2, 17, 64, 65, 100, 202, 203, 500]


def goat():
    return off_neutral(goat_prior(H, num_frequencies=2, length_scale=30.0))


def content(length=L, dtype=torch.float64):
    shapes = ((B, H, length, D), (B, HK, length, D), (B, HK, length, V))
    return [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def band(queries, keys, window):
    lag = queries[..., :, None] - keys[..., None, :]
    return (lag >= 0) & (lag < window)


def padding():
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask[0, 50:150] = True
    mask[1, :3] = mask[1, 190:] = True
    return mask


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_is_a_band_mask(window, is_padded, backend):
    prior, inputs, at = goat(), content(), torch.arange(L)
    allowed = band(at, at, window).expand(B, 1, L, L)
    arguments = {"key_padding_mask": padding()} if is_padded else {}
    allowed = allowed & ~padding()[:, None, None] if is_padded else allowed
    log_prior = prior.dense(at, at, dtype=torch.float64).detach()
    expected, _ = attention(*inputs, log_prior=log_prior, allowed=allowed)
    output = prior_attention(*inputs, prior=prior, is_causal=True, window=window, backend=backend, **arguments)
    assert_close(output, expected)
    empty = ~allowed.any(-1).expand(B, H, L)
    assert bool(empty.any()) == is_padded
    assert not output[empty].any()


@pytest.mark.parametrize("window", WINDOWS)
def test_gradients(window):
    prior, at = goat(), torch.arange(L)
    inputs = [tensor.requires_grad_() for tensor in content()]
    wanted = [*inputs, *prior.parameters()]
    upstream = normal(B, H, L, V, seed=9)
    log_prior = prior.dense(at, at, dtype=torch.float64)
    expected, _ = attention(*inputs, log_prior=log_prior, allowed=band(at, at, window))
    output = prior_attention(*inputs, prior=prior, is_causal=True, window=window, backend="sdpa")
    found = torch.autograd.grad(output, wanted, upstream)
    exact = torch.autograd.grad(expected, wanted, upstream)
    for actual, truth in zip(found, exact, strict=True):
        assert_close(actual, truth)


@pytest.mark.parametrize("first", [0, 1, 60, 150, 202])
@pytest.mark.parametrize("window", [1, 17, 80, 203])
def test_a_chunk_sees_what_it_would_in_the_whole(first, window):
    """Queries from ``first`` on, by a range or a tensor of positions, with more keys than any of them sees."""
    prior, (query, key, value) = goat(), content()
    whole = prior_attention(query, key, value, prior=prior, is_causal=True, window=window)
    for positions in (range(first, L), torch.arange(first, L)):
        part = prior_attention(
            query[:, :, first:], key, value, prior=prior, is_causal=True, window=window, query_positions=positions
        )
        assert_close(part, whole[:, :, first:])
    middle = slice(first, max(first + 1, L - 20))
    positions = range(middle.start, middle.stop)
    part = prior_attention(
        query[:, :, middle], key, value, prior=prior, is_causal=True, window=window, query_positions=positions
    )
    assert_close(part, whole[:, :, middle])


def test_a_window_counts_positions_and_not_indices():
    prior, inputs = goat(), content(9)
    queries, keys = torch.tensor([9, 2, 4, 0, 7, 1, 3, 8, 5]), torch.tensor([3, 0, 8, 1, 9, 5, 2, 4, 7])
    log_prior = prior.dense(queries, keys, dtype=torch.float64).detach()
    expected, _ = attention(*inputs, log_prior=log_prior, allowed=band(queries, keys, 3))
    at = {"query_positions": queries, "key_positions": keys}
    assert_close(prior_attention(*inputs, prior=prior, is_causal=True, window=3, **at), expected)


def test_a_mask_beside_a_window():
    inputs, at = content(), torch.arange(L)
    mask = normal(L, L, seed=5) > 0
    expected, _ = attention(*inputs, allowed=band(at, at, 17) & mask)
    assert_close(prior_attention(*inputs, attn_mask=mask, is_causal=True, window=17), expected)
    bias = normal(H, L, L, seed=5)
    expected, _ = attention(*inputs, log_prior=bias, allowed=band(at, at, 17))
    assert_close(prior_attention(*inputs, attn_mask=bias, is_causal=True, window=17), expected)


class Numbers(TorchDispatchMode):
    """The largest number of entries of any tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_tensor_grows_with_the_square_of_the_length():
    largest = []
    for length in (1024, 2048):
        with Numbers() as numbers, torch.no_grad():
            prior_attention(*content(length, torch.float32), prior=goat(), is_causal=True, window=64)
        largest.append(numbers.largest)
    assert largest[1] <= 2.05 * largest[0]


def test_a_prior_without_lanes_takes_the_reference():
    prior, inputs, at = off_neutral(RelativeBiasPrior(H, 3)), content(), torch.arange(L)
    log_prior = prior.dense(at, at, dtype=torch.float64).detach()
    expected, _ = attention(*inputs, log_prior=log_prior, allowed=band(at, at, 17))
    assert_close(prior_attention(*inputs, prior=prior, is_causal=True, window=17), expected)


@pytest.mark.parametrize("chunks", [[1] * 40, [25, 1, 1, 13], [7, 33]])
def test_a_layer_with_a_window_and_a_cache(chunks):
    layer = PriorAttention(24, H, num_kv_heads=HK, prior=goat(), window=9, dtype=torch.float64, batch_first=True).eval()
    x = normal(B, 40, 24)
    expected = layer(x, is_causal=True)[0]  # with weights: the dense path
    assert_close(layer(x, is_causal=True, need_weights=False)[0], expected)
    cache = layer.make_cache(B, 40)
    with torch.no_grad():
        parts = [layer(part, is_causal=True, need_weights=False, cache=cache)[0] for part in x.split(chunks, dim=1)]
    assert_close(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("window", [1, 4, 30])
def test_steps_with_a_window(window):
    """Decoding steps with a window, and one more with a padded token."""
    prior, inputs = goat(), content(30)
    cache = KeyValueCache(B, HK, 31, D, V, prior=prior, dtype=torch.float64)
    with torch.no_grad():
        parts = []
        for t in range(30):
            step = [side[:, :, t : t + 1] for side in inputs]
            parts.append(prior_attention(*step, prior=prior, is_causal=True, window=window, cache=cache))
        expected = prior_attention(*inputs, prior=prior, is_causal=True, window=window, backend="reference")
        hidden = torch.tensor([[True], [False]])
        prior_attention(*step, prior=prior, is_causal=True, window=window, cache=cache, key_padding_mask=hidden)
    assert_close(torch.cat(parts, dim=2), expected)


def test_a_window_with_a_cache_of_padded_samples():
    prior, (query, key, value) = goat(), content(40)
    hidden = torch.zeros(B, 10, dtype=torch.bool)
    hidden[1, :4] = True
    cache = KeyValueCache(B, HK, 40, D, V, prior=prior, dtype=torch.float64)
    parts, start = [], 0
    with torch.no_grad():
        for count, mask in ((10, hidden), *[(1, None)] * 30):
            step = [side[:, :, start : start + count] for side in (query, key, value)]
            parts.append(
                prior_attention(*step, prior=prior, is_causal=True, window=5, cache=cache, key_padding_mask=mask)
            )
            start += count
    alone = [side[1:, :, 4:] for side in (query, key, value)]
    expected = prior_attention(*alone, prior=prior, is_causal=True, window=5, backend="reference")
    assert_close(torch.cat(parts, dim=2)[1:, :, 4:], expected)


def test_windows_compile_for_all_lengths():
    """A graph for less than a block, one for one length of many blocks, one for all lengths, and one more."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, prior = CompileCounter(), goat()

    def attend(*inputs):
        return prior_attention(*inputs, prior=prior, is_causal=True, window=20)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for length in (64, 99, 150, 199, 256, 301):
        inputs = content(length)
        assert_close(compiled(*inputs), attend(*inputs))
    assert counter.frame_count <= 4
