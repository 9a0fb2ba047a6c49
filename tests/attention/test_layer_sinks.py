"""Sinks of a layer: those of nn.MultiheadAttention beside its tokens, and those that no prior touches."""

import pytest
import torch
from attention.oracles import attention, normal
from priors.cases import off_neutral
from tolerances import assert_close
from torch import nn
from torch._dynamo.testing import CompileCounter

from eotattn.attention import AttentionSinks, PackedDocuments, PriorAttention
from eotattn.priors import ClassTokenPrior, ForgettingPrior, RecencyPrior, RelativeBiasPrior, goat_prior, grid_positions

B, E, H, Q, K = 2, 24, 4, 5, 7
#: What nn.MultiheadAttention calls them.
KINDS = {
    "learned": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
}


def sinks(kv_heads=H, key_width=E // H):
    """A logit, a zero key and two registers a head."""
    sides = [torch.zeros(kv_heads, 2, width, dtype=torch.float64) for width in (key_width, E // H)]
    return AttentionSinks(logits=torch.zeros(H), has_zero_key=True, key=sides[0], value=sides[1])


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
        assert_close(weights, expected_weights[..., :K])  # the rest is that of the sinks
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


def made(kv_heads=H, dtype=torch.float64, **options):
    """A layer with random numbers and sinks of all kinds."""
    reserved = options.get("lanes") == "reserved"
    width = E // H - goat().num_lanes() * reserved
    options = {"prior": goat(), "num_kv_heads": kv_heads, "dtype": dtype, "batch_first": True, **options}
    return randomised(PriorAttention(E, H, sinks=sinks(kv_heads, width), **options))


@pytest.mark.parametrize("lanes", ["appended", "reserved"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_prior_does_not_touch_them(kv_heads, lanes):
    layer, x, at = made(kv_heads, lanes=lanes), normal(B, Q, E), torch.arange(Q)
    query, key, value = layer.project(x)
    logits = torch.zeros(B, H, Q, 2, dtype=torch.float64)
    logits[..., 0] = layer.sinks.logits[:, None]  # a key of zeros with a log-prior, and one without
    keys = [*(torch.zeros_like(key[:, :, :1]),) * 2, layer.sinks.key.expand(B, -1, -1, -1), key]
    values = [*(torch.zeros_like(value[:, :, :1]),) * 2, layer.sinks.value.expand(B, -1, -1, -1), value]
    of_tokens = layer.prior.dense(at, at, dtype=torch.float64).expand(B, -1, -1, -1)
    log_prior = torch.cat([logits, torch.zeros_like(logits), of_tokens], dim=-1)
    seen = torch.cat([torch.ones(Q, 4, dtype=torch.bool), at <= at[:, None]], dim=-1)
    heads, weights = attention(query, torch.cat(keys, 2), torch.cat(values, 2), log_prior=log_prior, allowed=seen)
    expected = layer.out_proj(heads.transpose(1, 2).flatten(2))
    assert_close(layer(x, is_causal=True, need_weights=False)[0], expected)
    output, found = layer(x, is_causal=True, average_attn_weights=False)
    assert_close(output, expected)
    assert_close(found, weights[..., 4:])
    expected.square().sum().backward()
    exact = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    layer(x, is_causal=True, need_weights=False)[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert_close(parameter.grad, exact[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("kind", ["logits", "zero"])
def test_a_far_query_gives_them_what_content_says(kind, backend, dtype):
    """Without content, a sink weighs as much as the query's own token, and each token before it its recency."""
    length, mean_lags = 512, (2.0, 20.0, 200.0, 5000.0)
    beside = AttentionSinks.logit(H) if kind == "logits" else AttentionSinks.zero_key()
    prior = RecencyPrior(H, mean_lags=mean_lags)
    layer = PriorAttention(E, H, prior=prior, sinks=beside, backend=backend, batch_first=True)
    with torch.no_grad():
        layer.in_proj.weight.zero_()
        layer.in_proj.bias.zero_()
        layer.in_proj.bias[-E:] = 1.0
        layer.out_proj.weight.copy_(torch.eye(E))
    x = torch.ones(1, length, E, dtype=dtype)
    output = layer.to(dtype)(x, is_causal=True, need_weights=False)[0]
    # lag by lag: exp(-lag * log(1 + 1 / mean_lag)) beside exp(0) of the sink
    decay = torch.tensor([lag / (1 + lag) for lag in mean_lags], dtype=torch.float64)
    tokens = (1 - decay ** torch.arange(1, length + 1)[:, None]) / (1 - decay)
    expected = tokens / (tokens + 1)
    # lanes in float32 carry up to 0.41 nats a token, each rounded by 2^-24 of itself
    tolerance = 4 * 0.41 * length * 2**-24 if dtype == torch.float32 else None
    assert_close(output[0].unflatten(-1, (H, -1)), expected[..., None].expand(-1, -1, E // H), tolerance=tolerance)


@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_holds_tokens_alone(padded):
    layer = made(2)
    x, cache = normal(B, 9, E), layer.make_cache(B, 9)
    padding = torch.zeros(B, 5, dtype=torch.bool)
    padding[1, :2] = padded
    arguments = {"is_causal": True, "need_weights": False, "cache": cache}
    with torch.no_grad():
        parts = [layer(x[:, :5], key_padding_mask=padding if padded else None, **arguments)[0]]
        parts += [layer(x[:, t : t + 1], **arguments)[0] for t in range(5, 9)]
    real = slice(2 if padded else 0, 9)
    assert_close(torch.cat(parts, dim=1)[1:, real], layer(x[1:, real], is_causal=True)[0])
    assert cache.length == 9


def test_documents_have_them_each():
    layer, x = made(), normal(1, 9, E)
    packed = layer(x, documents=PackedDocuments([4, 5]), is_causal=True, need_weights=False)[0]
    alone = [layer(part, is_causal=True, need_weights=False)[0] for part in x.split([4, 5], dim=1)]
    assert_close(packed, torch.cat(alone, dim=1))


def test_beside_forgetting_gates():
    """Gates hide far tokens, and no sink: pass, steps of a cache and documents agree with the dense form."""
    layer, x = made(prior=goat() + ForgettingPrior(E, H, half_lives=(1.0, 60.0))), normal(B, 30, E)
    options = {"is_causal": True, "need_weights": False}
    expected, weights = layer(x, is_causal=True)
    assert bool((weights.sum(-1) < 1).all())
    assert_close(layer(x, **options)[0], expected)
    cache = layer.make_cache(B, 30)
    with torch.no_grad():
        parts = [layer(x[:, start:stop], cache=cache, **options)[0] for start, stop in ((0, 17), (17, 18), (18, 30))]
    assert_close(torch.cat(parts, dim=1), expected)
    packed = layer(x[:1], documents=PackedDocuments([13, 17]), **options)[0]
    assert_close(packed, torch.cat([layer(part, **options)[0] for part in x[:1].split([13, 17], dim=1)], dim=1))


def test_a_layer_with_them_compiles_for_all_lengths():
    torch._dynamo.reset()
    layer, counter = made(dtype=torch.float32), CompileCounter()
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


def test_priors_of_grids_and_without_lanes_stand_beside_them():
    at = grid_positions(1, Q)
    layers = [made(prior=RelativeBiasPrior(H, 3)), made(prior=ClassTokenPrior(H))]
    for layer, positions in zip(layers, (None, at), strict=True):
        x = normal(B, Q, E)
        output, weights = layer(x, query_positions=positions, average_attn_weights=False)
        assert bool((weights.sum(-1) < 1).all())
        assert_close(layer(x, query_positions=positions, need_weights=False)[0], output)


@pytest.mark.parametrize("lanes", ["appended", "reserved"])
def test_state_moves_between_layers_with_them(lanes):
    layer, other, x = made(lanes=lanes), made(lanes=lanes), normal(B, Q, E)
    other.reset_parameters()
    assert not torch.equal(other(x)[0], layer(x)[0])
    assert {"sinks.logits", "sinks.key", "sinks.value"} <= set(layer.state_dict())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], layer(x)[0])
