"""Gated attention against its formula."""

import pytest
import torch
from attention.oracles import attention, causal, normal
from priors.cases import off_neutral
from tolerances import assert_close
from torch._dynamo.testing import CompileCounter

from eotattn.attention import AttentionSinks, GoatAttention, PriorAttention
from eotattn.priors import goat_prior

B, E, H, L = 2, 24, 4, 9


def made(kind, dtype=torch.float64, **options):
    prior = off_neutral(goat_prior(H, num_frequencies=1, num_key_frequencies=2, length_scale=20.0))
    layer = PriorAttention(E, H, prior=prior, output_gate=kind, dtype=dtype, batch_first=True, **options)
    with torch.no_grad():
        for n, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=n))
    return layer


@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("kind", ["elementwise", "head"])
def test_it_is_the_formula(kind, kv_heads):
    layer, x, at = made(kind, num_kv_heads=kv_heads), normal(B, L, E), torch.arange(L)
    query, key, value = layer.project(x)
    log_prior = layer.prior.dense(at, at, dtype=torch.float64)
    heads, _ = attention(query, key, value, log_prior=log_prior, allowed=causal(at, at))
    weight, bias = layer.output_gate.projection.weight, layer.output_gate.projection.bias
    each = E // H if kind == "elementwise" else 1
    assert weight.shape == (H * each, E)
    gated = []
    for h in range(H):
        rows = slice(h * each, (h + 1) * each)
        gated.append(heads[:, h] / (1 + torch.exp(-(x @ weight[rows].T + bias[rows]))))
    expected = layer.out_proj(torch.cat(gated, dim=-1))
    for need_weights in (True, False):
        assert_close(layer(x, is_causal=True, need_weights=need_weights)[0], expected)
    found, exact = (
        torch.autograd.grad(output.square().sum(), list(layer.parameters()))
        for output in (layer(x, is_causal=True, need_weights=False)[0], expected)
    )
    for ours, theirs in zip(found, exact, strict=True):
        assert_close(ours, theirs, tolerance=1e-5 if ours.dtype == torch.float32 else 1e-11)


def test_it_reads_queries_in_any_layout_and_beside_sinks():
    layer, x, memory = made("head", sinks=AttentionSinks.logit(H)), normal(B, L, E), normal(B, 5, E, seed=1)
    expected = layer(x, memory, need_weights=False)[0]
    assert_close(layer(x[0], memory[0], need_weights=False)[0], expected[0])
    layer.batch_first = False
    assert_close(
        layer(x.mT.mT.transpose(0, 1), memory.transpose(0, 1), need_weights=False)[0], expected.transpose(0, 1)
    )


def test_steps_of_a_cache():
    layer, x = made("elementwise"), normal(B, L, E)
    cache = layer.make_cache(B, L)
    with torch.no_grad():
        parts = [layer(x[:, t : t + 1], is_causal=True, need_weights=False, cache=cache)[0] for t in range(L)]
    assert_close(torch.cat(parts, dim=1), layer(x, is_causal=True, need_weights=False)[0])


def test_one_graph_for_all_lengths():
    torch._dynamo.reset()
    layer, counter = made("elementwise", dtype=torch.float32), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (5, 9, 12):
        x = normal(B, length, E).float()
        options = {"is_causal": True, "need_weights": False}
        assert_close(compiled(x, **options)[0], layer(x, **options)[0])
    assert counter.frame_count <= 2


def test_an_open_gate_is_no_gate():
    gated, plain = made("head", bias=True), made(None)
    state = {name: value for name, value in gated.state_dict().items() if not name.startswith("output_gate")}
    plain.load_state_dict(state)
    with torch.no_grad():
        gated.output_gate.projection.weight.zero_()
        gated.output_gate.projection.bias.fill_(40.0)
    x = normal(B, L, E)
    assert_close(gated(x, need_weights=False)[0], plain(x, need_weights=False)[0])
    gated.reset_parameters()
    assert gated.output_gate.projection.bias.abs().max() == 0


def test_a_gate_of_no_kind():
    for layer in (PriorAttention, GoatAttention):
        with pytest.raises(ValueError, match=rf"^{layer.__name__}: output_gate must be one of") as caught:
            layer(E, H, output_gate="sigmoid", batch_first=True)
        assert "\n" not in str(caught.value)
