"""Decoders: causal, equal in size, and different where their attention says so."""

import math

import pytest
import torch

from eotattn.experiments.networks import ATTENTION_KINDS, CopyReader, CopyReaderConfig, Decoder, DecoderConfig
from eotattn.priors import LogPrior


def decoder(attention, num_layers=2):
    torch.manual_seed(0)
    sizes = {"vocabulary_size": 11, "embed_dim": 12, "num_heads": 3, "num_frequencies": 2}
    return Decoder(DecoderConfig(attention, **sizes, num_layers=num_layers, train_length=6)).eval()


def tokens(length):
    return torch.randint(11, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ATTENTION_KINDS)
def test_decoder_is_causal(attention):
    network, before = decoder(attention), tokens(7)
    after = before.clone()
    after[:, 4:] = (after[:, 4:] + 1) % 11
    with torch.no_grad():
        one, other = network(before), network(after)
    assert one.shape == (2, 7, 11)
    assert torch.allclose(one[:, :4], other[:, :4], atol=1e-6)
    assert not torch.allclose(one[:, 4:], other[:, 4:], atol=1e-3)


@pytest.mark.parametrize("attention", ATTENTION_KINDS)
def test_attention_inputs_are_what_the_blocks_read(attention):
    network, seen = decoder(attention), []
    for block in network.blocks:
        block.attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(tokens(7))
        inputs = network.attention_inputs(tokens(7))
    assert len(inputs) == 2
    assert all(torch.equal(one, other) for one, other in zip(inputs, seen, strict=False))


def test_kinds_differ_in_their_priors_alone():
    def content(network):
        of_priors = {id(p) for m in network.modules() if isinstance(m, LogPrior) for p in m.parameters()}
        return [tuple(p.shape) for p in network.parameters() if id(p) not in of_priors]

    shapes = {name: content(decoder(name)) for name in ATTENTION_KINDS}
    assert all(shape == shapes["none"] for shape in shapes.values())


def test_alibi_is_frozen_and_goat_learns():
    assert not any(p.requires_grad for p in decoder("alibi").blocks[0].attention.prior.parameters())
    assert all(p.requires_grad for p in decoder("goat").blocks[0].attention.prior.parameters())


def test_num_targets_reads_out_the_end_of_the_full_pass():
    network = decoder("goat")
    with torch.no_grad():
        assert torch.allclose(network(tokens(7), num_targets=3), network(tokens(7))[:, -3:], atol=1e-6)


def test_interpolation_squeezes_long_positions_only():
    inside, outside = decoder("interpolated_rope"), decoder("rope")
    with torch.no_grad():
        assert torch.allclose(inside(tokens(6)), outside(tokens(6)), atol=1e-5)
        assert not torch.allclose(inside(tokens(12)), outside(tokens(12)), atol=1e-3)
    assert inside.positions(12, torch.device("cpu")).tolist() == [0.5 * j for j in range(12)]
    assert inside.positions(3, torch.device("cpu")).tolist() == [0.0, 1.0, 2.0]


def test_one_block_without_positions_cannot_tell_order():
    network, mixed = decoder("none", num_layers=1), tokens(5)
    swapped = mixed[:, [1, 0, 2, 3, 4]]
    with torch.no_grad():
        assert torch.allclose(network(mixed)[:, -1], network(swapped)[:, -1], atol=1e-5)
        ordered = decoder("sinusoidal", num_layers=1)
        assert not torch.allclose(ordered(mixed)[:, -1], ordered(swapped)[:, -1], atol=1e-3)


def test_copy_reader_starts_without_any_preference():
    network = CopyReader(CopyReaderConfig(vocabulary_size=5, embed_dim=6, num_heads=3))
    positions = torch.arange(5)
    assert float(network.prior.dense(positions, positions).detach().abs().max()) == 0.0
    assert network(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attention": "alibl"}, "attention must be one of 'goat', 'alibi', 'rope'"),
        ({"attention": "goat", "embed_dim": 10}, r"embed_dim must be a multiple of 2 \* num_heads = 8; got 10"),
        ({"attention": "goat", "num_layers": 0}, "num_layers must be at least 1; got 0"),
    ],
)
def test_bad_configurations_say_what_is_wrong(arguments, says):
    with pytest.raises(ValueError, match=says):
        DecoderConfig(**arguments)


def test_paper_frequencies_are_the_default():
    assert DecoderConfig("goat").max_period == pytest.approx(2 * math.pi * 10_000)
