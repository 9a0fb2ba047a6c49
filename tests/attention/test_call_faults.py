"""Calls that were once answered wrongly, each with the right value: masks, parameters, graphs."""

import math

import pytest
import torch
from attention.oracles import attention, causal, normal
from priors.cases import off_neutral
from tolerances import assert_close, relative_error

from eotattn.attention import KeyValueCache, PackedDocuments, prior_attention
from eotattn.priors import LogPrior, RecencyPrior, SinkPrior, goat_prior

B, H, D = 1, 4, 16
#: An output in bfloat16 is rounded once at the end, 2^-9, and its weights once on the way.
BF16 = 8e-3


def content(queries, keys=None, dtype=torch.bfloat16):
    return [
        normal(B, H, length, D, seed=seed, dtype=dtype)
        for seed, length in enumerate((queries, *2 * (keys or queries,)))
    ]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2048), (B, H, 1, 2048)])
def test_a_key_bias_more_precise_than_the_content(shape, backend):
    inputs = content(64, 2048)
    bias = (0.35 * torch.arange(2048.0)).expand(shape)
    if shape[1] > 1:
        bias = bias * torch.linspace(0.5, 1, H)[:, None, None]
    expected, _ = attention(*inputs, log_prior=bias)
    output = prior_attention(*inputs, attn_mask=bias, backend=backend)
    assert relative_error(output, expected) < BF16


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_lowest_number_of_a_wider_dtype_in_a_mask(dtype, lowest, backend):
    """Keys at the lowest float32 number have no weight beside others, as at minus infinity."""
    inputs = content(24, dtype=dtype)
    seen = causal(torch.arange(24), torch.arange(24))
    mask = torch.zeros(24, 24).masked_fill(~seen, lowest)
    output = prior_attention(*inputs, attn_mask=mask, backend=backend)
    assert relative_error(output, attention(*inputs, allowed=seen)[0]) < BF16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backends_agree_on_a_row_at_the_lowest_number(dtype):
    inputs, mask = content(8, dtype=dtype), torch.zeros(8, 8)
    mask[3] = torch.finfo(torch.float32).min
    outputs = [prior_attention(*inputs, attn_mask=mask, backend=backend) for backend in ("sdpa", "reference")]
    assert relative_error(outputs[0], outputs[1].double()) < BF16


def prior():
    return RecencyPrior(H) + 0.5 * off_neutral(SinkPrior(H, 2, length_scale=9.0))


def fused_step(prior):
    optimizer = torch.optim.AdamW(prior.parameters(), lr=0.3, fused=True)
    positions = torch.arange(6)
    prior.dense(positions, positions).square().sum().backward()
    optimizer.step()


def through_data(prior):
    for parameter in prior.parameters():
        parameter.data += 0.4


@pytest.mark.parametrize("change", [fused_step, through_data])
def test_decoding_follows_parameters_however_they_change(change):
    log_prior, inputs = prior(), content(9, dtype=torch.float32)
    cache = KeyValueCache(B, H, 9, D, D, prior=log_prior)
    with torch.no_grad():
        prior_attention(*(side[:, :, :6] for side in inputs), prior=log_prior, is_causal=True, cache=cache)
    before = log_prior.dense(torch.arange(9), torch.arange(9)).detach()
    change(log_prior)
    after = log_prior.dense(torch.arange(9), torch.arange(9), dtype=torch.float64).detach()
    assert relative_error(before, after) > 0.05
    for at in range(6, 9):
        with torch.no_grad():
            step = (side[:, :, at : at + 1] for side in inputs)
            output = prior_attention(*step, prior=log_prior, is_causal=True, cache=cache)
        seen = [inputs[0][:, :, at : at + 1], *(side[:, :, : at + 1] for side in inputs[1:])]
        assert_close(output, attention(*seen, log_prior=after[:, at : at + 1, : at + 1])[0].float())


def counted_graphs():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return graphs, backend


@pytest.mark.parametrize("window", [None, 4])
def test_packings_of_documents_share_compiled_graphs(window):
    log_prior, inputs = goat_prior(H, num_frequencies=2, length_scale=16.0), content(32, dtype=torch.float32)
    pattern, (graphs, backend) = {"is_causal": True, "window": window}, counted_graphs()
    torch.compiler.reset()

    @torch.compile(backend=backend, dynamic=False)
    def call(query, key, value, documents):
        return prior_attention(query, key, value, prior=log_prior, documents=documents, **pattern)

    for lengths in ([5, 27], [9, 23], [14, 18], [20, 12], [4, 8, 20]):
        documents = PackedDocuments(lengths)
        expected = prior_attention(*inputs, prior=log_prior, documents=documents, **pattern)
        assert_close(call(*inputs, documents), expected)
    assert len(graphs) == 1


def test_a_device_is_asked_for_before_lanes_are_made(monkeypatch):
    log_prior, inputs = goat_prior(H, num_frequencies=2, length_scale=16.0), content(8, dtype=torch.float32)
    monkeypatch.setattr(LogPrior, "lanes", lambda *_, **__: pytest.fail("lanes were made"))
    with pytest.raises((ValueError, RuntimeError), match="GPU"):
        prior_attention(*inputs, prior=log_prior, backend="varlen", documents=PackedDocuments([8]))
