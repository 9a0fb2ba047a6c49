"""Appended keys: those of nn.MultiheadAttention, sinks that a prior of the tokens does not touch."""

import math

import pytest
import torch
from attention.oracles import attention, normal
from priors.cases import off_neutral
from tolerances import assert_close
from torch import nn
from torch._dynamo.testing import CompileCounter

from eotattn.attention import PriorAttention
from eotattn.priors import RecencyPrior, RelativeBiasPrior, goat_prior

B, E, H, Q, K = 2, 24, 4, 5, 7
KINDS = {
    "learned": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
}
MASKS = {
    "none": {},
    "boolean": {"attn_mask": normal(Q, K, seed=5) > 0.9},
    "of one column": {"attn_mask": (normal(Q, 1, seed=5) > 0.9).expand(Q, K)},
    "floating of every head": {"attn_mask": normal(B * H, Q, K, seed=5)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5 + [True] * 2, [True] * 7])},
    "floating padding": {"key_padding_mask": normal(B, K, seed=6)},
    "both": {"attn_mask": normal(Q, K, seed=5) > 1.2, "key_padding_mask": normal(B, K, seed=7) > 1.2},
}


def randomised(layer, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return layer


def goat():
    return off_neutral(goat_prior(H, num_frequencies=1, num_key_frequencies=2, length_scale=20.0))


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prior", [lambda: None, lambda: goat_prior(H, init="neutral")], ids=["no prior", "neutral"])
def test_conversion_is_equivalent(prior, kind, masks):
    theirs = randomised(nn.MultiheadAttention(E, H, batch_first=True, **KINDS[kind])).double()
    ours = PriorAttention.from_multihead_attention(theirs, prior=prior())
    query, key, value = normal(B, Q, E), normal(B, K, E, seed=1), normal(B, K, E, seed=2)
    for average in (True, False):
        expected, expected_weights = theirs(query, key, value, average_attn_weights=average, **MASKS[masks])
        output, weights = ours(query, key, value, average_attn_weights=average, **MASKS[masks])
        assert_close(output, expected)
        assert_close(weights, expected_weights)
    assert_close(ours(query, key, value, need_weights=False, **MASKS[masks])[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_causal_queries_see_them(kind):
    theirs = randomised(nn.MultiheadAttention(E, H, batch_first=True, **KINDS[kind])).double()
    ours, x = PriorAttention.from_multihead_attention(theirs), normal(B, Q, E)
    mask = nn.Transformer.generate_square_subsequent_mask(Q, dtype=torch.float64)
    expected, _ = theirs(x, x, x, attn_mask=mask)
    for need_weights in (True, False):
        assert_close(ours(x, is_causal=True, need_weights=need_weights)[0], expected)
        assert_close(ours(x, attn_mask=mask, need_weights=need_weights)[0], expected)
        tensor = torch.arange(Q)
        assert_close(ours(x, is_causal=True, query_positions=tensor, need_weights=need_weights)[0], expected)


@pytest.mark.parametrize("lanes", ["appended", "reserved"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_does_not_touch_them(kind, kv_heads, lanes):
    make = {"num_kv_heads": kv_heads, "lanes": lanes, "dtype": torch.float64}
    layer = randomised(PriorAttention(E, H, prior=goat(), **make, **KINDS[kind], batch_first=True))
    off_neutral(layer.prior)
    x, count = normal(B, Q, E), layer.appended.count
    query, key, value = layer.project(x)
    keys, values = [], []
    if layer.appended.learned:
        keys.append(layer.appended.key.expand(B, -1, -1, -1))
        values.append(layer.appended.value.expand(B, -1, -1, -1))
    if layer.appended.zero:
        keys.append(torch.zeros(B, kv_heads, 1, key.shape[-1], dtype=torch.float64))
        values.append(torch.zeros(B, kv_heads, 1, value.shape[-1], dtype=torch.float64))
    key, value = torch.cat([*keys, key], dim=2), torch.cat([*values, value], dim=2)
    positions = torch.arange(-count, Q)
    of_tokens = layer.prior.prior.dense(torch.arange(Q), torch.arange(Q), dtype=torch.float64)
    log_prior = torch.cat([torch.zeros(H, Q, count, dtype=torch.float64), of_tokens], dim=-1)
    seen = positions <= torch.arange(Q)[:, None]
    heads, weights = attention(query, key, value, log_prior=log_prior, allowed=seen)
    expected = layer.out_proj(heads.transpose(1, 2).flatten(2))
    assert_close(layer(x, is_causal=True, need_weights=False)[0], expected)
    output, found = layer(x, is_causal=True, average_attn_weights=False)
    assert_close(output, expected)
    assert_close(found, torch.cat([weights[..., count:], weights[..., :count]], dim=-1))
    expected.square().sum().backward()
    exact = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    layer(x, is_causal=True, need_weights=False)[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert_close(parameter.grad, exact[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_far_query_gives_them_what_content_says(kind, backend, dtype):
    """Without content, a sink weighs as much as the query's own token, and each token before it its recency."""
    length, mean_lags = 512, (2.0, 20.0, 200.0, 5000.0)
    layer = PriorAttention(E, H, prior=RecencyPrior(H, mean_lags=mean_lags), batch_first=True, **KINDS[kind])
    with torch.no_grad():
        for parameter in (*layer.in_proj.parameters(), *layer.appended.parameters()):
            parameter.zero_()
        layer.in_proj.bias[-E:] = 1.0
        layer.out_proj.weight.copy_(torch.eye(E))
    layer.backend = backend
    x = torch.ones(1, length, E, dtype=dtype)
    output = layer.to(dtype)(x, is_causal=True, need_weights=False)[0]
    # lag by lag: exp(-lag * log(1 + 1 / mean_lag)) beside exp(0) of every appended key
    decay = torch.tensor([lag / (1 + lag) for lag in mean_lags], dtype=torch.float64)
    tokens = (1 - decay ** torch.arange(1, length + 1)[:, None]) / (1 - decay)
    expected = tokens / (tokens + layer.appended.count)
    # lanes in float32 carry up to 0.41 nats a token, each rounded by 2^-24 of itself
    tolerance = 4 * 0.41 * length * 2**-24 if dtype == torch.float32 else None
    assert_close(output[0].unflatten(-1, (H, -1)), expected[..., None].expand(-1, -1, E // H), tolerance=tolerance)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_holds_them_once(kind, padded):
    layer = randomised(
        PriorAttention(E, H, num_kv_heads=2, prior=goat(), dtype=torch.float64, **KINDS[kind], batch_first=True)
    )
    x, cache = normal(B, 9, E), layer.make_cache(B, 9)
    padding = torch.zeros(B, 5, dtype=torch.bool)
    padding[1, :2] = padded
    arguments = {"is_causal": True, "need_weights": False, "cache": cache}
    with torch.no_grad():
        parts = [layer(x[:, :5], key_padding_mask=padding if padded else None, **arguments)[0]]
        parts += [layer(x[:, t : t + 1], **arguments)[0] for t in range(5, 9)]
    real = slice(2 if padded else 0, 9)
    assert_close(torch.cat(parts, dim=1)[1:, real], layer(x[1:, real], is_causal=True)[0])
    assert cache.length == 9 + layer.appended.count


def test_they_are_initialised_as_in_multihead_attention():
    """Xavier-normal over (1, 1, E): the standard deviation is 1 / sqrt(E)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = PriorAttention(512, 8, add_bias_kv=True, batch_first=True)
        theirs = nn.MultiheadAttention(512, 8, add_bias_kv=True)
    spread = float(theirs.bias_k.detach().std())
    assert math.isclose(float(layer.appended.key.detach().std()), spread, rel_tol=0.15)
    assert {"appended.key", "appended.value"} <= set(layer.state_dict())
    before = layer.appended.key.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.appended.key, before)


def test_they_stand_before_positions_of_any_dtype():
    layer, x = (
        randomised(PriorAttention(E, H, prior=goat(), add_bias_kv=True, dtype=torch.float64, batch_first=True)),
        normal(B, Q, E),
    )
    expected, _ = layer(x, is_causal=True, need_weights=False)
    for dtype in (torch.uint8, torch.int16, torch.float32):
        positions = torch.arange(Q, dtype=dtype)
        assert_close(layer(x, is_causal=True, query_positions=positions, need_weights=False)[0], expected)


def test_a_layer_with_them_compiles_for_all_lengths():
    torch._dynamo.reset()
    layer, counter = randomised(PriorAttention(E, H, prior=goat(), **KINDS["both"], batch_first=True)), CompileCounter()
    compiled = torch.compile(
        lambda x, padding: layer(x, is_causal=True, key_padding_mask=padding, need_weights=False)[0],
        fullgraph=True,
        backend=counter,
    )
    for length in (5, 7, 12, 17, 24):
        x, padding = normal(B, length, E).float(), torch.zeros(B, length, dtype=torch.bool)
        padding[1, 3:] = True
        expected, _ = layer(x, is_causal=True, key_padding_mask=padding, need_weights=False)
        assert_close(compiled(x, padding), expected)
    assert counter.frame_count <= 2


def test_a_prior_without_lanes_does_not_touch_them_either():
    layer = randomised(
        PriorAttention(E, H, prior=RelativeBiasPrior(H, 3), add_zero_attn=True, batch_first=True, dtype=torch.float64)
    )
    with torch.no_grad():
        layer.in_proj.weight.zero_(), layer.in_proj.bias.zero_()
    _, weights = layer(normal(B, Q, E), is_causal=True, average_attn_weights=False)
    table = layer.prior.prior.dense(torch.arange(Q), torch.arange(Q), dtype=torch.float64).exp().tril()
    assert_close(weights[0, ..., -1], 1 / (1 + table.sum(-1)))


@pytest.mark.parametrize("lanes", ["appended", "reserved"])
def test_state_moves_between_layers_with_them(lanes):
    make = {"lanes": lanes, "batch_first": True, **KINDS["both"]}
    layer, x = randomised(PriorAttention(E, H, prior=goat(), **make)), normal(B, Q, E).float()
    other = PriorAttention(
        E, H, prior=goat_prior(H, num_frequencies=1, num_key_frequencies=2, length_scale=20.0), **make
    )
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], layer(x)[0])
    other.reset_parameters()
    assert not torch.equal(other(x)[0], layer(x)[0])
