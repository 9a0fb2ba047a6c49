"""Sampling: the cache changes nothing, draws follow the network; what cannot be cached is refused."""

import pytest
import torch

from eotattn.experiments.networks import Decoder, DecoderConfig
from eotattn.experiments.sampling import sample_continuations


def decoder(attention, vocabulary_size=5):
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "train_length": 16}
    return Decoder(DecoderConfig(attention, vocabulary_size=vocabulary_size, **sizes)).eval().double()


@pytest.mark.parametrize("attention", ["goat", "rope", "alibi", "none"])
@torch.no_grad()
def test_reading_with_caches_equals_reading_at_once(attention):
    network = decoder(attention)
    tokens = torch.randint(5, (3, 11), generator=torch.Generator().manual_seed(0))
    caches = network.make_caches(3, 11)
    parts = [network(part, caches=caches) for part in tokens.split([5, 1, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), network(tokens), rtol=0, atol=1e-10)


@torch.no_grad()
def test_draws_follow_the_network():
    network = decoder("goat")
    for parameter in network.readout.parameters():
        parameter.mul_(20)  # a distribution that is far from uniform
    prompts = torch.tensor([[0, 3, 1]]).expand(4000, -1)
    drawn = sample_continuations(network, prompts, 2, seed=1, num_tokens=4)
    expected = network(prompts[:1])[0, -1, :4].softmax(-1)
    share = torch.bincount(drawn[:, 0], minlength=4).double() / len(drawn)
    assert float(expected.max()) > 0.4
    torch.testing.assert_close(share, expected, rtol=0, atol=0.03)
    given = torch.tensor([[0, 3, 1, int(share.argmax())]])
    after = drawn[drawn[:, 0] == share.argmax(), 1]
    share = torch.bincount(after, minlength=4).double() / len(after)
    torch.testing.assert_close(share, network(given)[0, -1, :4].softmax(-1), rtol=0, atol=0.05)


def test_equal_seeds_give_equal_draws_and_the_rest_of_the_vocabulary_is_never_drawn():
    network, prompts = decoder("rope"), torch.zeros(50, 2, dtype=torch.long)
    one, again, other = (sample_continuations(network, prompts, 6, seed=seed, num_tokens=3) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert set(one.flatten().tolist()) == {0, 1, 2}


@pytest.mark.parametrize("attention", ["interpolated_rope", "ntk_rope", "sinusoidal", "learned"])
def test_attention_that_reads_whole_sequences_is_refused(attention):
    with pytest.raises(NotImplementedError, match=f"make_caches: attention '{attention}' does not read positions"):
        decoder(attention).make_caches(1, 8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"length": 0}, "length must be at least 1"),
        ({"num_tokens": 6}, "num_tokens must lie between 1 and the vocabulary's 5; got 6"),
    ],
)
def test_bad_arguments_say_what_is_wrong(change, says):
    arguments = {"length": 2, "seed": 0, "num_tokens": 4} | change
    with pytest.raises(ValueError, match=says):
        sample_continuations(decoder("rope"), torch.zeros(1, 2, dtype=torch.long), **arguments)


def test_a_network_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="network must be in evaluation mode"):
        sample_continuations(decoder("rope").train(), torch.zeros(1, 2, dtype=torch.long), 2, seed=0, num_tokens=4)
