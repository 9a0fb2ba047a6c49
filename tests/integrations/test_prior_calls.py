"""What capture makes of the masks and priors of our own attention calls."""

import pytest
import torch
from tolerances import assert_close

from eotattn import PriorAttention
from eotattn.attention import AttentionSinks
from eotattn.attention.statistics import streaming
from eotattn.integrations import capture, prior_calls
from eotattn.priors import RecencyPrior, SinkPrior

E, H, L = 16, 2, 23


def layer_and_tokens(dtype, **options):
    torch.manual_seed(0)
    prior = RecencyPrior(H) + SinkPrior(H)
    layer = PriorAttention(E, H, prior=prior, batch_first=True, dtype=dtype, **options).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer, torch.randn(2, L, E, dtype=dtype)


def padding():
    mask = torch.zeros(2, L, dtype=torch.bool)
    mask[1, :6] = True
    return mask


CALLS = {
    "causal": ({}, {}),
    "window": ({"window": 5}, {}),
    "padding": ({}, {"key_padding_mask": padding()}),
    "window and padding": ({"window": 5}, {"key_padding_mask": padding()}),
    "logits": ({"sinks": AttentionSinks.logit(H)}, {"key_padding_mask": padding()}),
    "registers": ({"sinks": AttentionSinks.registers(H, E // H, 2), "window": 5}, {}),
    "mask and padding": ({}, {"key_padding_mask": padding(), "attn_mask": torch.ones(L, L).triu(4).bool()}),
}


@pytest.mark.parametrize("name", CALLS)
def test_masks_keep_their_meaning(name):
    made, called = CALLS[name]
    layer, tokens = layer_and_tokens(torch.float64, **made)
    with torch.no_grad(), capture(layer) as captured:
        layer(tokens, is_causal=True, need_weights=False, **called)
    with torch.no_grad():
        _, weights = layer(tokens, is_causal=True, average_attn_weights=False, **called)
    (found,) = captured.layers.values()
    real = ~called.get("key_padding_mask", torch.zeros(2, L, dtype=torch.bool))
    weights = weights * real[:, None, :, None]
    expected = weights.sum(2)
    for sample, start in enumerate((~real).sum(-1).tolist()):
        assert_close(found.column_mass[sample, :, : L - start], expected[sample, :, start:], tolerance=1e-10)
    sink = (1 - weights.sum(-1)) * real[:, None] if "sinks" in made else torch.zeros_like(weights[..., 0])
    assert_close(found.sums["explicit_sink_mass"], sink.sum(-1), tolerance=1e-10)
    outcomes = torch.cat([weights, sink.unsqueeze(-1)], -1)
    assert_close(found.sums["participation"], outcomes.square().sum((-1, -2)), tolerance=1e-10)
    entropy = -torch.special.xlogy(outcomes, outcomes).sum((-1, -2))
    assert_close(found.sums["entropy"], entropy, tolerance=1e-10)


@pytest.mark.parametrize("kind", ["logits", "registers"])
def test_lanes_leave_sinks_where_they_are(kind, monkeypatch):
    """A GPU's statistics read lanes, which leave out a number a row: the sink's logit has to follow."""
    made, _ = CALLS[kind]
    layer, tokens = layer_and_tokens(torch.float64, **made)
    found = []
    for reads_lanes in (False, True):
        monkeypatch.setattr(prior_calls, "_reads_lanes", lambda _, answer=reads_lanes: answer)
        with torch.no_grad(), capture(layer, certify=True) as captured:
            layer(tokens, is_causal=True, need_weights=False)
        found += captured.layers.values()
        assert float(captured.certificates.popitem()[1].max()) < 1e-12
    for name, sums in found[0].sums.items():
        if not name.startswith("prior"):
            assert_close(found[1].sums[name], sums, tolerance=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["causal", "window", "padding", "window and padding", "logits", "registers"])
def test_on_the_gpu_the_kernel_computes_them(name, monkeypatch):
    made, called = CALLS[name]
    layer, tokens = layer_and_tokens(torch.float32, **made)
    used, compute = [], streaming.tile_statistics

    def counted(*arguments):
        used.append(arguments)
        return compute(*arguments)

    with torch.no_grad(), capture(layer) as expected:
        layer(tokens, is_causal=True, need_weights=False, **called)
    monkeypatch.setattr(streaming, "tile_statistics", counted)
    called = {key: value.cuda() for key, value in called.items()}
    layer.cuda()
    with torch.no_grad(), capture(layer) as found:
        layer(tokens.cuda(), is_causal=True, need_weights=False, **called)
    assert used
    (ours,), (theirs,) = found.layers.values(), expected.layers.values()
    for key in theirs.sums:
        assert_close(ours.sums[key], theirs.sums[key], tolerance=1e-3)
    assert_close(ours.column_mass, theirs.column_mass, tolerance=1e-4)
    assert_close(ours.lag_mass, theirs.lag_mass, tolerance=1e-4)
