"""What is measured on sinks, against networks whose answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional

from eotattn.experiments.interventions import in_eight_bits, keys_beyond, target_losses, without_key_only
from eotattn.experiments.networks import Decoder, DecoderConfig
from eotattn.experiments.sink_measures import FIRST_QUERY, activation_outliers, mass_by_signal, measure_sinks
from eotattn.priors import SinkPrior

CONFIG = DecoderConfig("rope", 13, num_layers=2, embed_dim=12, num_heads=3, train_length=24, block="llama")


def decoder(attention, *, spread=0.3):
    """A decoder whose parameters are all in use."""
    torch.manual_seed(0)
    network = Decoder(replace(CONFIG, attention=attention)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += spread * torch.randn(parameter.shape)
    return network


def tokens(length=40, count=3):
    return torch.randint(13, (count, length), generator=torch.Generator().manual_seed(1))


def test_a_sink_without_content_is_all_prior():
    network = decoder("rope_key_only", spread=0.0)
    for block in network.blocks:
        torch.nn.init.zeros_(block.attention.in_proj.weight)
        block.attention.prior.first_token.data = torch.tensor([0.0, 1.0, 5.0])
    heads = measure_sinks(network, tokens())
    expected = [np.mean([math.exp(u) / (math.exp(u) + i) for i in range(1, 40)]) for u in (0.0, 1.0, 5.0)]
    assert heads.mass == pytest.approx(np.array([expected, expected]), rel=1e-5)
    for name in ("margin", "prior_margin", "key_only"):
        assert getattr(heads, name) == pytest.approx(np.array([[0.0, 1.0, 5.0]] * 2), abs=1e-5), name
    found = heads.summary()
    assert found["sink_rate"] == pytest.approx(1 / 3)
    assert found["prior_share"] == pytest.approx(1.0, abs=1e-5)
    assert found["key_only_of_sinks"] == pytest.approx(5.0, abs=1e-5)


def test_without_a_prior_all_of_the_margin_is_content():
    heads = measure_sinks(decoder("rope"), tokens())
    assert np.abs(heads.margin).max() > 0.1
    assert heads.prior_margin == pytest.approx(np.zeros((2, 3)), abs=1e-4)
    assert np.isnan(heads.key_only).all()
    assert heads.outside == pytest.approx(np.zeros((2, 3)), abs=1e-6)


def test_the_priors_part_is_that_of_its_dense_form():
    network, length = decoder("fast_paper_goat"), 40
    heads = measure_sinks(network, tokens(length))
    for block, found in zip(network.blocks, heads.prior_margin, strict=True):
        dense = block.attention.prior.dense(torch.arange(length), torch.arange(length), dtype=torch.float64).detach()
        rows = [dense[:, i, 0] - dense[:, i, 1 : i + 1].mean(-1) for i in range(FIRST_QUERY, length)]
        assert found == pytest.approx(torch.stack(rows).mean(0).numpy(), abs=1e-4)


def test_explicit_sinks_take_weight_that_is_no_keys():
    network = decoder("rope_zero_key", spread=0.0)
    for block in network.blocks:
        torch.nn.init.zeros_(block.attention.in_proj.weight)
    heads = measure_sinks(network, tokens())
    assert heads.outside == pytest.approx(np.full((2, 3), np.mean([1 / (i + 2) for i in range(1, 40)])), rel=1e-5)


def still_decoder():
    """A decoder whose blocks change nothing, so that the residual stream is the embedding."""
    network = decoder("rope")
    for block in network.blocks:
        torch.nn.init.zeros_(block.attention.out_proj.weight)
        torch.nn.init.zeros_(block.mlp.down.weight)
    return network


def test_outliers_of_the_residual_stream():
    network, read = still_decoder(), tokens()
    read[:, 0] = 12
    with torch.no_grad():
        network.embedding.weight[12, 4] = -70.0
    found = activation_outliers(network, read)
    hidden = network.embedding.weight.detach().double().numpy()[read.numpy()]
    ratios = [np.abs(each[0]).max() / np.sort(np.abs(each), axis=None)[(each.size - 1) // 2] for each in hidden]
    assert found["massive"] == pytest.approx(np.mean(ratios), rel=1e-5)
    assert found["kurtosis"] == pytest.approx(stats.kurtosis(hidden, axis=-1, fisher=False).mean(), rel=1e-5)


def test_figure_2c_counts_the_queries_of_its_protocol():
    reports = mass_by_signal(decoder("rope"), tokens(20), num_bins=3)
    assert int(reports["last block, all queries"].counts.sum()) == 3 * 19
    assert int(reports["all blocks, late queries"].counts.sum()) == 2 * 3 * 9


# Interventions ------------------------------------------------------------------------------------------------------


def test_losses_are_of_the_last_tokens_after_the_first_one():
    network, windows = decoder("alibi"), tokens(31)
    found = target_losses(network, windows, length=20, num_targets=6, beginning=12, batch_tokens=40)
    read = windows[:, -21:-1].clone()
    read[:, 0] = 12
    with torch.no_grad():
        logits = network(read)[:, -6:].double()
    expected = [functional.cross_entropy(each, window[-6:]) for each, window in zip(logits, windows, strict=True)]
    assert found.tolist() == pytest.approx([float(loss) for loss in expected], rel=1e-5)


@pytest.mark.parametrize("attention", ["rope", "fast_goat", "forgetting", "rope_sink_logit"])
def test_dropped_keys_are_those_of_a_window(attention):
    network, read = decoder(attention), tokens(20)
    with torch.no_grad():
        masked = network(read, hidden_keys=keys_beyond(20, 5, keeps_first=False))
        for block in network.blocks:
            block.attention.window = 5
        assert masked == pytest.approx(network(read), abs=1e-4)


def test_eight_bits_round_matrices_and_what_they_multiply():
    network, seen = decoder("rope"), []
    reader = in_eight_bits(network)
    for block in reader.blocks:
        block.mlp.down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        reader(tokens())
    for values in [*seen, *(block.attention.in_proj.weight for block in reader.blocks)]:
        steps = values / values.abs().max() * 127
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert values.unique().numel() > 20
    before, after = (n.blocks[0].attention.in_proj.weight.detach() for n in (network, reader))
    assert 0 < float((before - after).abs().max()) <= float(before.abs().max()) / 254 * 1.001


def test_taking_u_away_leaves_the_rest():
    network = decoder("fast_goat")
    changed = without_key_only(network)
    for block, other in zip(network.blocks, changed.blocks, strict=True):
        for part, kept in zip(block.attention.prior.parts, other.attention.prior.parts, strict=True):
            for one, two in zip(part.parameters(), kept.parameters(), strict=True):
                assert torch.equal(two, torch.zeros_like(one) if isinstance(part, SinkPrior) else one)
    assert without_key_only(decoder("rope")) is None
