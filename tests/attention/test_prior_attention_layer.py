"""PriorAttention and GoatAttention: against nn.MultiheadAttention, the paper's equations, and life in a model."""

import copy
import math
import pickle

import pytest
import torch
from attention.oracles import attention, causal, normal
from priors.cases import off_neutral
from tolerances import assert_close
from torch import nn

from eotattn.attention import GoatAttention, PriorAttention, Rotary
from eotattn.priors import FourierPrior, RecencyPrior, RelativeBiasPrior, SinkPrior, goat_prior

B, E, H, Q, K = 2, 24, 4, 5, 7


def inputs(length=Q, width=E, *, seed=0, dtype=torch.float64):
    return normal(B, length, width, seed=seed, dtype=dtype)


def randomised(layer, *, seed=3):
    """Give every parameter of a layer, biases and prior too, a generic value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    if getattr(layer, "prior", None) is not None:
        off_neutral(layer.prior, seed=seed)
    return layer


def goat(seed=0):
    return off_neutral(goat_prior(H, num_frequencies=1, num_key_frequencies=2, length_scale=20.0), seed=seed)


def split_heads(flat, heads):
    return flat.unflatten(-1, (heads, -1)).transpose(1, 2)


# The layer is its equations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lanes", ["appended", "reserved"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("need_weights", [False, True])
def test_self_attention(kv_heads, lanes, dtype, need_weights):
    layer = randomised(PriorAttention(E, H, num_kv_heads=kv_heads, prior=goat(), lanes=lanes, batch_first=True)).to(
        dtype
    )
    x, positions = inputs(dtype=dtype), torch.arange(Q)
    width = E // H - (layer.prior.num_lanes() if lanes == "reserved" else 0)
    assert layer.content_dim == width
    sizes = [H * width, kv_heads * width, kv_heads * E // H]
    flat = (x.double() @ layer.in_proj.weight.double().T + layer.in_proj.bias.double()).split(sizes, dim=-1)
    content = [split_heads(part, heads) for part, heads in zip(flat, (H, kv_heads, kv_heads), strict=True)]
    log_prior = layer.prior.dense(positions, positions, dtype=torch.float64)
    heads, expected_weights = attention(*content, log_prior=log_prior, allowed=causal(positions, positions))
    expected = heads.transpose(1, 2).flatten(2) @ layer.out_proj.weight.double().T + layer.out_proj.bias.double()
    output, weights = layer(x, is_causal=True, need_weights=need_weights)
    assert output.dtype == dtype
    assert_close(output, expected)
    assert (weights is None) != need_weights
    if need_weights:
        assert_close(weights, expected_weights.mean(1))
        _, by_head = layer(x, is_causal=True, average_attn_weights=False)
        assert_close(by_head, expected_weights)


def test_goat_attention_is_the_papers_equations():
    """Rewritten from the paper: frequencies base^(-r/(R-1)), kappa, u(j), slopes; content at 1 / sqrt(d_c)."""
    frequencies, key_waves, scale = 3, 4, 50.0
    layer = GoatAttention(64, H, num_frequencies=frequencies, length_scale=scale, batch_first=True)
    randomised(layer).double()
    fourier, recency, sink = copy.deepcopy(layer.prior).freeze().parts
    x = inputs(9, 64)
    content_width = 64 // H - (2 * frequencies + 3)
    assert layer.content_dim == content_width
    projected = x @ layer.in_proj.weight.T + layer.in_proj.bias
    query, key, value = projected.split([H * content_width, H * content_width, 64], dim=-1)
    output = torch.zeros(B, 9, 64, dtype=torch.float64)
    slope_of = [2.0 ** (-2 * (h + 1)) for h in range(H)]  # ALiBi for four heads
    for h in range(H):
        q, k = (part[..., h * content_width : (h + 1) * content_width] for part in (query, key))
        v = value[..., h * 16 : (h + 1) * 16]
        log_prior = torch.zeros(9, 9, dtype=torch.float64)
        for i in range(9):
            for j in range(9):
                for r in range(frequencies):
                    phase = (10_000.0 ** (-r / (frequencies - 1))) * (i - j)
                    log_prior[i, j] += float(fourier.even[h, r]) * math.cos(phase)
                    log_prior[i, j] += float(fourier.odd[h, r]) * math.sin(phase)
                log_prior[i, j] -= abs(float(recency.strength[h])) * slope_of[h] * (i - j)
                log_prior[i, j] += float(sink.first_token[h]) * (j == 0)
                log_prior[i, j] += float(sink.growth[h]) * math.log(1 + j) / math.log(1 + scale)
                for m in range(key_waves):
                    shortest, longest = 16.0, 2 * math.pi * scale
                    period = shortest * (longest / shortest) ** (m / (key_waves - 1))
                    log_prior[i, j] += float(sink.even[h, m]) * math.cos(2 * math.pi * j / period)
                    log_prior[i, j] += float(sink.odd[h, m]) * math.sin(2 * math.pi * j / period)
        for i in range(9):
            score = torch.stack([(q[:, i] * k[:, j]).sum(-1) / math.sqrt(content_width) for j in range(i + 1)], -1)
            mass = torch.exp(score + log_prior[i, : i + 1])
            weights = mass / mass.sum(-1, keepdim=True)
            output[:, i, h * 16 : (h + 1) * 16] = (weights[..., None] * v[:, : i + 1]).sum(1)
    expected = output @ layer.out_proj.weight.T + layer.out_proj.bias
    for need_weights in (False, True):
        assert_close(layer(x, is_causal=True, need_weights=need_weights)[0], expected)


@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (10, 13), (10, None), (None, 13)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cross_attention(kv_heads, kdim, vdim):
    layer = randomised(
        PriorAttention(E, H, num_kv_heads=kv_heads, kdim=kdim, vdim=vdim, prior=goat(), batch_first=True)
    ).double()
    query, key, value = inputs(), inputs(K, kdim or E, seed=1), inputs(K, vdim or E, seed=2)
    content = layer.project(query, key, value)
    assert [tuple(x.shape) for x in content] == [(B, H, Q, 6), (B, kv_heads, K, 6), (B, kv_heads, K, 6)]
    log_prior = layer.prior.dense(torch.arange(Q), torch.arange(K), dtype=torch.float64)
    heads, _ = attention(*content, log_prior=log_prior)
    expected = layer.out_proj(heads.transpose(1, 2).flatten(2))
    assert_close(layer(query, key, value)[0], expected)
    assert_close(layer(query, key, value, need_weights=False)[0], expected)


def test_key_and_value_default_to_the_query():
    layer, x, y = randomised(PriorAttention(E, H, prior=goat(), batch_first=True)).double(), inputs(), inputs(K, seed=1)
    assert torch.equal(layer(x)[0], layer(x, x, x)[0])
    assert_close(layer(x)[0], layer(x, x.clone(), x.clone())[0])
    assert_close(layer(x, y)[0], layer(x, y, y.clone())[0])
    assert_close(layer(x, value=x.flip(1))[0], layer(x, x.clone(), x.flip(1))[0])


@pytest.mark.parametrize("lanes", ["appended", "reserved"])
def test_strided_views_of_one_storage_are_different_inputs(lanes):
    """Overlapping views share a data pointer and are not the same tensor."""
    layer = randomised(PriorAttention(E, H, prior=goat(), lanes=lanes, batch_first=True)).double()
    storage = inputs(9)
    query, key, value = storage[:, :4], storage[:, ::2][:, :4], storage[:, : 4 * 2 : 2].flip(1)
    assert query.data_ptr() == key.data_ptr()
    expected, _ = layer(query.clone(), key.clone(), value.clone(), need_weights=False)
    assert_close(layer(query, key, value, need_weights=False)[0], expected)
    turned = storage.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(layer(turned)[0], layer(storage)[0])


# Positions and caches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
def test_positions_reach_prior_and_rotary(need_weights):
    layer = PriorAttention(
        E, H, prior=off_neutral(SinkPrior(H, 2, length_scale=9.0)), rotary=Rotary(E // H), batch_first=True
    ).double()
    x, positions = inputs(), torch.tensor([4, 0, 9, 2, 7])
    shuffled, _ = layer(x, query_positions=positions, is_causal=True, need_weights=need_weights)
    order = positions.argsort()
    ordered, _ = layer(x[:, order], query_positions=positions[order], is_causal=True, need_weights=need_weights)
    assert_close(shuffled[:, order], ordered)
    samples = torch.stack([positions, positions.flip(0)])
    by_sample, _ = layer(x, query_positions=samples, is_causal=True, need_weights=need_weights)
    assert_close(by_sample[:1], shuffled[:1])
    other, _ = layer(x[1:], query_positions=positions.flip(0), is_causal=True, need_weights=need_weights)
    assert_close(by_sample[1:], other)


@pytest.mark.parametrize("prior", [goat, lambda: off_neutral(RelativeBiasPrior(H, 3)), lambda: None])
@pytest.mark.parametrize("chunks", [[1] * 9, [5, 1, 3], [4, 4, 1]])
def test_a_cache_gives_the_full_pass(prior, chunks):
    layer = (
        randomised(PriorAttention(E, H, num_kv_heads=2, prior=prior(), rotary=Rotary(E // H), batch_first=True))
        .double()
        .eval()
    )
    x = inputs(9)
    expected, _ = layer(x, is_causal=True, need_weights=False)
    cache = layer.make_cache(B, 9)
    parts = [layer(part, is_causal=True, need_weights=False, cache=cache)[0] for part in x.split(chunks, dim=1)]
    assert_close(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_remembers_padding(side):
    """A sample with padding continues as it would alone, at its own positions."""
    layer = randomised(PriorAttention(E, H, prior=goat(), batch_first=True)).double().eval()
    prompt, following = inputs(5), inputs(3, seed=1)
    padding = torch.zeros(B, 5, dtype=torch.bool)
    real = slice(2, None) if side == "left" else slice(0, 3)
    padding[1] = True
    padding[1, real] = False
    cache = layer.make_cache(B, 8)
    layer(prompt, key_padding_mask=padding, is_causal=True, need_weights=False, cache=cache)
    steps = [layer(x, is_causal=True, need_weights=False, cache=cache)[0] for x in following.split(1, dim=1)]
    alone = torch.cat([prompt[1:, real], following[1:]], dim=1)
    expected, _ = layer(alone, is_causal=True, need_weights=False)
    assert_close(torch.cat(steps, dim=1)[1:], expected[:, 3:])
    first, _ = layer(torch.cat([prompt[:1], following[:1]], dim=1), is_causal=True, need_weights=False)
    assert_close(torch.cat(steps, dim=1)[:1], first[:, 5:])


# nn.MultiheadAttention ----------------------------------------------------------------------------------------------


def twins(*, batch_first=True, dtype=torch.float64, **widths):
    """An nn.MultiheadAttention and its conversion, generic weights and biases."""
    theirs = randomised(nn.MultiheadAttention(E, H, batch_first=batch_first, **widths)).to(dtype)
    return theirs, PriorAttention.from_multihead_attention(theirs)


def arranged(x, batch_first):
    return x if batch_first else x.transpose(0, 1)


MASKS = {
    "none": {},
    "boolean": {"attn_mask": normal(Q, K, seed=5) > 0.9},
    "floating": {"attn_mask": normal(Q, K, seed=5)},
    "boolean of every head": {"attn_mask": normal(B * H, Q, K, seed=5) > 0.9},
    "floating of every head": {"attn_mask": normal(B * H, Q, K, seed=5)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5 + [True] * 2, [True] + [False] * 6])},
    "floating padding": {"key_padding_mask": normal(B, K, seed=6)},
    "both boolean": {"attn_mask": normal(Q, K, seed=5) > 1.2, "key_padding_mask": normal(B, K, seed=7) > 1.2},
    "both floating": {"attn_mask": normal(Q, K, seed=5), "key_padding_mask": normal(B, K, seed=6)},
    "both of every head": {
        "attn_mask": normal(B * H, Q, K, seed=5),
        "key_padding_mask": normal(B, K, seed=6).masked_fill(normal(B, K, seed=7) > 1.2, -math.inf),
    },
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 10, "vdim": 13}], ids=["packed", "apart"])
def test_without_a_prior_it_is_multihead_attention(masks, batch_first, widths):
    theirs, ours = twins(batch_first=batch_first, **widths)
    values = inputs(), inputs(K, widths.get("kdim", E), seed=1), inputs(K, widths.get("vdim", E), seed=2)
    values = [arranged(x, batch_first) for x in values]
    for average in (True, False):
        expected, expected_weights = theirs(*values, average_attn_weights=average, **MASKS[masks])
        assert expected.isfinite().all()
        output, weights = ours(*values, average_attn_weights=average, **MASKS[masks])
        assert_close(output, expected)
        assert_close(weights, expected_weights)
    fused, nothing = ours(*values, need_weights=False, **MASKS[masks])
    assert nothing is None
    assert_close(fused, expected)


@pytest.mark.parametrize("masks", ["none", "boolean", "floating", "one padding", "every head"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_without_a_batch_axis(masks, batch_first):
    theirs, ours = twins(batch_first=batch_first)
    arguments = {
        "one padding": {"key_padding_mask": torch.tensor([False] * 5 + [True] * 2)},
        "every head": {"attn_mask": normal(H, Q, K, seed=5) > 0.9},
    }.get(masks, MASKS.get(masks))
    values = inputs()[0], inputs(K, seed=1)[0], inputs(K, seed=2)[0]
    expected, expected_weights = theirs(*values, **arguments)
    output, weights = ours(*values, **arguments)
    assert_close(output, expected)
    assert_close(weights, expected_weights)


def test_causal_without_a_mask_beside_it():
    theirs, ours = twins()
    x = inputs()
    mask = nn.Transformer.generate_square_subsequent_mask(Q, dtype=torch.float64)
    expected, _ = theirs(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    assert_close(ours(x, is_causal=True)[0], expected)
    assert_close(ours(x, attn_mask=mask, is_causal=True)[0], expected)
    assert_close(ours(x, attn_mask=mask)[0], expected)


def test_boolean_masks_of_four_axes():
    layer, x = randomised(PriorAttention(E, H, prior=goat(), batch_first=True)).double(), inputs()
    mask = normal(B, H, Q, Q, seed=5) > 0.5
    mask[..., 0] = False
    assert_close(layer(x, attn_mask=mask)[0], layer(x, attn_mask=mask.flatten(0, 1))[0])


def test_conversion_with_a_neutral_prior_changes_nothing():
    """Content keeps its whole width: the prior's lanes are appended."""
    theirs = randomised(nn.MultiheadAttention(E, H, dropout=0.2, batch_first=True)).double().eval()
    layer = PriorAttention.from_multihead_attention(theirs, prior=goat_prior(H, init="neutral"))
    x = inputs()
    assert_close(layer(x, need_weights=False)[0], theirs(x, x, x, need_weights=False)[0])
    assert (layer.dropout, layer.batch_first, layer.training) == (0.2, True, False)


def test_conversion_without_biases():
    theirs = randomised(nn.MultiheadAttention(E, H, bias=False, batch_first=True)).double()
    layer, x = PriorAttention.from_multihead_attention(theirs), inputs()
    assert not [name for name, _ in layer.named_parameters() if "bias" in name]
    assert_close(layer(x)[0], theirs(x, x, x)[0])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masks", ["none", "causal", "padding", "both"])
def test_inside_a_transformer_encoder_layer(masks, training, batch_first, norm_first):
    """In evaluation too, where the layer has a fused path of its own that would ignore our module."""
    make = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first, "dtype": torch.float64}
    plain = randomised(nn.TransformerEncoderLayer(E, H, 32, **make))
    held = copy.deepcopy(plain)
    held.self_attn = PriorAttention.from_multihead_attention(plain.self_attn, prior=goat_prior(H, init="neutral"))
    arguments = {}
    if masks in ("causal", "both"):
        # a padding mask beside it must have its dtype
        arguments["src_mask"] = torch.ones(Q, Q, dtype=torch.bool).triu(1)
    if masks in ("padding", "both"):
        arguments["src_key_padding_mask"] = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = arranged(inputs(), batch_first)
    plain.train()  # its fused path in evaluation is not the oracle
    expected = plain(x, **arguments)
    held.train(training)
    with torch.set_grad_enabled(training):
        assert_close(held(x, **arguments), expected)
        neutral = held(x, **arguments)
        off_neutral(held.self_attn.prior)
        assert (held(x, **arguments) - neutral).abs().max() > 1e-3, "the prior must not be bypassed"


def test_inside_a_transformer_encoder_with_a_causal_hint():
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    layer.self_attn = randomised(PriorAttention(E, H, prior=goat(), dtype=torch.float64, batch_first=True))
    mask = nn.Transformer.generate_square_subsequent_mask(Q, dtype=torch.float64)
    x = inputs()
    with_hint, without = layer(x, src_mask=mask, is_causal=True), layer(x, src_mask=mask)
    assert_close(with_hint, without)
    later = x.clone()
    later[:, -1] += 1.0
    assert_close(layer(later, src_mask=mask, is_causal=True)[:, :-1], with_hint[:, :-1])


# Fully masked rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_sample_of_padding_gives_the_output_bias(need_weights):
    layer, x = randomised(PriorAttention(E, H, prior=goat(), batch_first=True)).double(), inputs().requires_grad_()
    padding = torch.tensor([[False] * Q, [True] * Q])
    output, weights = layer(x, key_padding_mask=padding, need_weights=need_weights)
    torch.testing.assert_close(output[1], layer.out_proj.bias.expand(Q, E))
    assert weights is None or not weights[1].any()
    output.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


# Training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", ["appended", "reserved"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_no_row_of_a_projection_is_dead(lanes, need_weights):
    layer = randomised(PriorAttention(E, H, prior=goat(), lanes=lanes, batch_first=True)).double()
    output, _ = layer(inputs(), is_causal=True, need_weights=need_weights)
    (output * normal(B, Q, E, seed=8)).sum().backward()
    for projection in (layer.in_proj, layer.out_proj):
        assert (projection.weight.grad.abs().amax(1) > 1e-9).all()
    for name, parameter in layer.prior.named_parameters():
        assert (parameter.grad.abs() > 1e-12).all(), name


@pytest.mark.parametrize("need_weights", [True, False])
def test_every_parameter_takes_part_from_the_start(need_weights):
    """Without this, distributed training complains of unused parameters. A key bias alone cannot matter to softmax."""
    layer = GoatAttention(64, H, num_frequencies=3, init="neutral", batch_first=True).double()
    (layer(inputs(9, 64), is_causal=True, need_weights=need_weights)[0] * normal(B, 9, 64, seed=8)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_dropout_only_in_training():
    layer = randomised(PriorAttention(E, H, prior=goat(), dropout=0.5, batch_first=True)).double()
    x = inputs()
    expected, _ = randomised(PriorAttention(E, H, prior=goat(), batch_first=True)).double()(x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for need_weights in (True, False):
            assert (layer.train()(x, need_weights=need_weights)[0] - expected).abs().max() > 1e-2
            assert_close(layer.eval()(x, need_weights=need_weights)[0], expected)


def test_inference_mode_and_then_training():
    layer, x = randomised(GoatAttention(64, H, num_frequencies=3, batch_first=True)), inputs(9, 64, dtype=torch.float32)
    with torch.inference_mode():
        expected, _ = layer(x, is_causal=True, need_weights=False)
    output, _ = layer(x, is_causal=True, need_weights=False)
    output.sum().backward()
    assert torch.equal(output, expected)


# Dtypes, copies, states ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_casts_touch_the_projections_alone(cast, need_weights):
    layer = randomised(GoatAttention(64, H, num_frequencies=3, batch_first=True))
    x = inputs(9, 64)
    exact = copy.deepcopy(layer).double()(x, is_causal=True)[0]
    dtype = {"half": torch.float16, "double": torch.float64}.get(cast, torch.bfloat16)
    layer = layer.to(torch.bfloat16) if cast == "to" else getattr(layer, cast)()
    assert {p.dtype for p in layer.prior.parameters()} == {torch.float32}
    assert {p.dtype for n, p in layer.named_parameters() if not n.startswith("prior")} == {dtype}
    output, _ = layer(x.to(dtype), is_causal=True, need_weights=need_weights)
    assert output.dtype == dtype
    # three matrix products with rounded weights and rounded results: several units of 2^-8
    assert_close(output, exact, tolerance=3e-2 if dtype == torch.bfloat16 else 5e-3 if dtype != torch.float64 else None)


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(need_weights):
    """Errors at the level of the same layer without a prior."""
    length, x = 700, normal(1, 700, E, dtype=torch.float32)
    error = {}
    for name, prior in (("plain", None), ("prior", RecencyPrior(H))):
        layer = randomised(PriorAttention(E, H, prior=prior, batch_first=True))
        exact, _ = copy.deepcopy(layer).double()(x.double(), is_causal=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, _ = layer(x, is_causal=True, need_weights=need_weights)
        assert output.shape == (1, length, E)
        error[name] = float(((output.double() - exact).norm() / exact.norm()).detach())
    assert error["prior"] <= max(1.5 * error["plain"], 1e-2)


def test_deepcopy_pickle_and_state_dict():
    layer, x = (
        randomised(GoatAttention(64, H, num_kv_heads=2, num_frequencies=3, batch_first=True)).double(),
        inputs(9, 64),
    )
    expected, _ = layer(x, is_causal=True)
    other = GoatAttention(64, H, num_kv_heads=2, num_frequencies=3, batch_first=True).double()
    other.load_state_dict(layer.state_dict())
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(again(x, is_causal=True)[0], expected)
        randomised(again, seed=9)
        assert not torch.equal(again(x, is_causal=True)[0], expected)
    assert torch.equal(layer(x, is_causal=True)[0], expected)


def test_meta_device():
    with torch.device("meta"):
        layer = GoatAttention(64, H, num_frequencies=3, batch_first=True)
    assert {p.device.type for p in (*layer.parameters(), *layer.buffers())} == {"meta"}
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(math.nan)
    layer.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())
    fresh = GoatAttention(64, H, num_frequencies=3, batch_first=True)
    assert all(torch.equal(a, b) for a, b in zip(layer.prior.buffers(), fresh.prior.buffers(), strict=True))


def test_a_prior_that_is_passed_in_keeps_its_values():
    """It may come trained or loaded; only an explicit reset puts it back."""
    prior = off_neutral(goat_prior(H, form="paper"))
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    layer = PriorAttention(E, H, prior=prior, batch_first=True)
    converted = PriorAttention.from_multihead_attention(nn.MultiheadAttention(E, H), prior=prior)
    assert converted.prior is prior is layer.prior
    assert all(torch.equal(before[name], value) for name, value in prior.state_dict().items())
    layer.reset_parameters()
    assert not torch.equal(before["parts.0.even"], prior.state_dict()["parts.0.even"])


def test_initialisation_is_that_of_multihead_attention():
    """Xavier-uniform over the packed matrix, zero biases."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = PriorAttention(E, H, batch_first=True)
        bound = math.sqrt(6 / (E + 3 * E))
        assert not layer.in_proj.bias.any()
        assert not layer.out_proj.bias.any()
        assert 0.95 * bound < layer.in_proj.weight.abs().max() <= bound


def test_compile():
    """One graph of the layer, forward and backward, equal to eager execution."""
    layer, x = (
        randomised(PriorAttention(E, H, prior=goat(), batch_first=True)),
        inputs(dtype=torch.float32).requires_grad_(),
    )
    expected, _ = layer(x, is_causal=True, need_weights=False)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output, _ = compiled(x, is_causal=True, need_weights=False)
    assert_close(output, expected)
    assert_close(torch.autograd.grad(output.square().sum(), x)[0], gradient)


def test_a_fourier_prior_in_reserved_lanes_leaves_the_rest():
    layer = PriorAttention(E, H, prior=FourierPrior(H, 2), lanes="reserved", batch_first=True)
    assert (layer.content_dim, layer.head_dim) == (2, 6)
    assert layer.in_proj.weight.shape == (2 * H * 2 + E, E)


def test_export_with_positions_of_every_sample():
    """A length that equals the batch is a length like any other."""
    layer, x = PriorAttention(E, H, prior=goat(), batch_first=True), normal(3, 7, E).float()

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, positions):
            return self.layer(x, is_causal=True, query_positions=positions, need_weights=False)[0]

    length = torch.export.Dim("length", min=2, max=64)
    arguments = (x, torch.arange(7).expand(3, 7))
    exported = torch.export.export(Causal(), arguments, dynamic_shapes=({1: length}, {1: length})).module()
    longer, positions = normal(3, 9, E).float(), torch.arange(9) + torch.tensor([[0], [4], [50]])
    assert_close(exported(longer, positions), Causal()(longer, positions))
