"""Evaluation: equal bytes at every length, and sink statistics that agree with the layer's own weights."""

import math

import pytest
import torch
from torch.nn import functional

from eotattn.experiments.evaluation import sink_observations, target_bits
from eotattn.experiments.networks import ATTENTION_KINDS, Decoder, DecoderConfig


def decoder(attention="goat"):
    torch.manual_seed(0)
    network = Decoder(
        DecoderConfig(attention, vocabulary_size=11, num_layers=2, embed_dim=12, num_heads=3, train_length=4)
    )
    for parameter in network.parameters():  # a start is too symmetric to test anything
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


def windows(count=5, length=16):
    return torch.randint(11, (count, length + 1), generator=torch.Generator().manual_seed(1))


def test_every_length_scores_the_same_last_bytes():
    network, held_out = decoder(), windows()
    for length in (4, 8, 16):
        got = target_bits(network, held_out, length=length, num_targets=4, batch_tokens=20)
        for n in range(5):
            tokens = held_out[n : n + 1, 16 - length :]
            with torch.no_grad():
                log_probabilities = functional.log_softmax(network(tokens[:, :-1]), -1)[0]
            losses = [-float(log_probabilities[length - 4 + k, held_out[n, 13 + k]]) for k in range(4)]
            assert float(got[n]) == pytest.approx(sum(losses) / 4 / math.log(2), rel=1e-5)


def test_uniform_predictions_cost_log2_of_the_vocabulary():
    network = decoder()
    torch.nn.init.zeros_(network.readout.weight)
    for length in (4, 16):
        bits = target_bits(network, windows(), length=length, num_targets=4)
        assert bits.tolist() == pytest.approx([math.log2(11)] * 5)


@pytest.mark.parametrize("attention", ATTENTION_KINDS)
def test_sink_observations_agree_with_the_weights_of_the_layer(attention):
    network, tokens = decoder(attention), windows(2, 6)
    positions = network.positions(7, torch.device("cpu"))
    observed = list(sink_observations(network, tokens, first_query=3))
    assert len(observed) == 2
    for block, hidden, found in zip(network.blocks, network.attention_inputs(tokens), observed, strict=True):
        _, weights = block.attention(
            hidden, need_weights=True, average_attn_weights=False, is_causal=True, query_positions=positions
        )
        assert torch.allclose(found.sink_mass, weights[:, :, 3:, 0], atol=1e-5)
        assert found.score_range.shape == (2, 3, 4)


def test_score_range_leaves_the_prior_out():
    network = decoder("alibi")
    before = next(sink_observations(network, windows(2, 6)))
    network.blocks[0].attention.prior.strength.data.mul_(9.0)
    after = next(sink_observations(network, windows(2, 6)))
    assert torch.equal(before.score_range, after.score_range)
    assert not torch.allclose(before.sink_mass, after.sink_mass)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: target_bits(decoder(), windows(), length=17, num_targets=4), "the window's 16 tokens; got 17"),
        (lambda: target_bits(decoder(), windows(), length=3, num_targets=4), "lie between num_targets = 4"),
        (lambda: next(sink_observations(decoder(), windows(), first_query=17)), "first_query must lie between 1 and"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, says):
    with pytest.raises(ValueError, match=says):
        call()
