"""The paper's own package, ``goat-attention``, with matched parameters, in float32.

What corresponds to what: its frequencies base^(-k / (R - 1)) are periods from 2 pi to 2 pi base; lambda_sym and
lambda_asym are even and odd; softplus(recency_slope_raw) are the slopes; sink_bump is first_token. Its u(j) is a small
network on waves, t / L and ln(1 + t) / ln(1 + L). Since silu(x) - silu(-x) = x, two of its hidden units make it exactly
linear, and with no weight on t / L it is a SinkPrior, times sink_gain of the head.
"""

import copy
import math

import pytest
import torch
from tolerances import assert_close, centre_rows
from torch.nn import functional

from eotattn.attention import PriorAttention
from eotattn.priors import FourierPrior, RecencyPrior, SinkPrior

goat = pytest.importorskip("goat")

R, M = 3, 4
TRAINING_LENGTH = 37
BASE = 500.0
EMBED_DIM, HEADS = 48, 3


def package_layer(kv_heads=HEADS, *, seed=0):
    """A layer of the package whose every prior parameter is off its start and whose u(j) is linear in its features."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    layer = goat.GoatAttention(
        EMBED_DIM,
        HEADS,
        kv_num_heads=kv_heads,
        batch_first=True,
        pos_rank=R,
        abs_rank=M,
        pos_base=BASE,
        abs_base=float(TRAINING_LENGTH),
        training_seq_len=TRAINING_LENGTH,
    )
    weights = random(2 * M + 2)
    weights[2 * M] = 0.0  # the feature t / L, which has no counterpart
    with torch.no_grad():
        layer.lambda_sym.copy_(random(kv_heads, R))
        layer.lambda_asym.copy_(random(kv_heads, R))
        layer.recency_slope_raw.copy_(random(kv_heads))
        layer.sink_bump.copy_(random(kv_heads))
        layer.sink_gain.copy_(random(kv_heads))
        for parameter in layer.key_bias.parameters():
            parameter.zero_()
        layer.key_bias.fc1.weight[:2] = torch.stack([weights, -weights])
        layer.key_bias.fc2.weight[0, :2] = torch.tensor([1.0, -1.0])
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
            projection.weight.copy_(0.3 * random(*projection.weight.shape))
            projection.bias.copy_(0.3 * random(*projection.bias.shape))
    return layer, weights


def matched_parts(layer, weights):
    """The same prior as (Fourier, recency, sink); heads are query heads, so groups repeat."""
    group = HEADS // layer.kv_num_heads
    fourier = FourierPrior(HEADS, R, 2 * math.pi, 2 * math.pi * BASE)
    recency = RecencyPrior(HEADS)
    sink = SinkPrior(HEADS, M, length_scale=float(TRAINING_LENGTH), min_period=2 * math.pi)
    slopes = functional.softplus(layer.recency_slope_raw).double()
    gain = layer.sink_gain[:, None]
    with torch.no_grad():
        fourier.even.copy_(layer.lambda_sym.repeat_interleave(group, 0))
        fourier.odd.copy_(layer.lambda_asym.repeat_interleave(group, 0))
        recency.strength.copy_(slopes.repeat_interleave(group) / torch.tensor(recency.unit_slopes))
        sink.first_token.copy_(layer.sink_bump.repeat_interleave(group))
        sink.even.copy_((gain * weights[:M]).repeat_interleave(group, 0))
        sink.odd.copy_((gain * weights[M : 2 * M]).repeat_interleave(group, 0))
        sink.growth.copy_((gain * weights[2 * M + 1])[:, 0].repeat_interleave(group))
    return fourier, recency, sink


@pytest.mark.parametrize("kv_heads", [HEADS, 1])
def test_log_prior(kv_heads):
    layer, weights = package_layer(kv_heads)
    fourier, recency, sink = matched_parts(layer, weights)
    positions = torch.arange(61)  # beyond the training length too
    cpu = torch.device("cpu")
    without_recency = (fourier + sink).dense(positions, positions).mean(0)
    assert_close(layer.compute_log_prior(61, cpu), without_recency, tolerance=1e-5)
    causal = layer.compute_log_prior(61, cpu, is_causal=True)
    complete = (fourier + recency + sink).dense(positions, positions).mean(0)
    assert_close(centre_rows(causal), centre_rows(complete), tolerance=1e-5)


@pytest.mark.parametrize("lanes", ["appended", "reserved"])
@pytest.mark.parametrize("kv_heads", [HEADS, 1])
@pytest.mark.parametrize("is_causal", [True, False])
def test_whole_layer(lanes, kv_heads, is_causal):
    """The package projects whole heads and ignores rows behind its content width; ours are as wide as the content."""
    theirs, weights = package_layer(kv_heads, seed=1)
    fourier, recency, sink = matched_parts(theirs, weights)
    prior = fourier + recency + sink if is_causal else fourier + sink  # the package has recency under causality alone
    matched = copy.deepcopy(prior.state_dict())
    ours = PriorAttention(EMBED_DIM, HEADS, num_kv_heads=kv_heads, lanes=lanes, prior=prior, batch_first=True)
    prior.load_state_dict(matched)  # the layer's constructor puts its prior back to its start
    copy_projections(theirs, ours)
    inputs = torch.randn(2, 23, EMBED_DIM, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, expected_weights = theirs(inputs, inputs, inputs, is_causal=is_causal)
        output, _ = ours(inputs, is_causal=is_causal, need_weights=False)
        _, mean_weights = ours(inputs, is_causal=is_causal)
    assert_close(output, expected, tolerance=1e-5)
    assert_close(mean_weights, expected_weights, tolerance=1e-5)


def copy_projections(theirs, ours):
    """Copy what is alive. A query row is rescaled, since scores end up at 1 / sqrt(content width) in both."""
    width, content, head = theirs.content_dim, ours.content_dim, EMBED_DIM // HEADS
    shared = min(width, content)
    rows = {"q": HEADS, "k": theirs.kv_num_heads}
    blocks = []
    with torch.no_grad():
        for name, heads in rows.items():
            projection = getattr(theirs, f"{name}_proj")
            weight, bias = projection.weight.view(heads, head, -1), projection.bias.view(heads, head)
            weight[:, shared:] = 0.0  # a row of theirs that ours is too narrow for
            bias[:, shared:] = 0.0
            factor = math.sqrt(content / width) if name == "q" else 1.0
            copied = torch.zeros(heads, content, EMBED_DIM + 1)
            copied[:, :shared, :-1] = factor * weight[:, :shared]
            copied[:, :shared, -1] = factor * bias[:, :shared]
            blocks.append(copied.flatten(0, 1))
        blocks.append(torch.cat([theirs.v_proj.weight, theirs.v_proj.bias[:, None]], dim=1))
        joined = torch.cat(blocks)
        ours.in_proj.weight.copy_(joined[:, :-1])
        ours.in_proj.bias.copy_(joined[:, -1])
        ours.out_proj.load_state_dict(theirs.out_proj.state_dict())
