"""Decoders: causal, equal in size, and different where their attention says so."""

import math

import pytest
import torch
from lowered_graphs import graphs_of

from eotattn.attention import AttentionSinks, PriorAttention, Rotary
from eotattn.attention.layer.output_gate import OutputGate
from eotattn.experiments.networks import ATTENTION_KINDS, CopyReader, CopyReaderConfig, Decoder, DecoderConfig
from eotattn.experiments.networks.growing_scores import GrowingScoreAttention
from eotattn.experiments.networks.narrow_lanes import NarrowLanesPrior
from eotattn.experiments.networks.rotations import LeadingHeadsRotary, StretchedRotary
from eotattn.experiments.optimisation import TrainingConfig, parameter_groups, split_by_rate
from eotattn.priors import KeyTablePrior, LogPrior, RecencyPrior, goat_prior


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
        beside = LogPrior | AttentionSinks | OutputGate
        of_priors = {id(p) for m in network.modules() if isinstance(m, beside) for p in m.parameters()}
        return [tuple(p.shape) for p in network.parameters() if id(p) not in of_priors]

    shapes = {name: content(decoder(name)) for name in ATTENTION_KINDS}
    extra = {"learned": [(6, 12)]}  # the table of positions
    for name, shape in shapes.items():
        assert sorted(shape) == sorted(shapes["none"] + extra.get(name, [])), name


def test_alibi_is_frozen_and_goat_learns():
    assert not any(p.requires_grad for p in decoder("alibi").blocks[0].attention.prior.parameters())
    assert all(p.requires_grad for p in decoder("goat").blocks[0].attention.prior.parameters())


@pytest.mark.parametrize("attention", ["sinusoidal", "learned"])
def test_embedded_positions_do_not_drown_the_tokens(attention):
    network, seen = decoder(attention), []
    network.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(tokens(7))
        words = network.embedding(tokens(7))
    assert 0.5 < float((seen[0] - words).norm() / words.norm()) < 2.0


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


ORDERLESS = {"none", "growing_none"}
NEUTRAL = {"sink_only", "relative_only", "t5"}  # their log-priors start at zero


@pytest.mark.parametrize("attention", ATTENTION_KINDS)
def test_one_block_tells_order_unless_nothing_tells_it_positions(attention):
    network, mixed = decoder(attention, num_layers=1), tokens(5)
    swapped = mixed[:, [1, 0, 2, 3, 4]]
    with torch.no_grad():
        same = torch.allclose(network(mixed)[:, -1], network(swapped)[:, -1], atol=1e-5)
        assert same == (attention in ORDERLESS | NEUTRAL)
        for parameter in network.blocks[0].attention.prior.parameters() if attention in NEUTRAL else ():
            parameter.add_(torch.arange(1.0, 1 + parameter.numel()).reshape(parameter.shape))
        same = torch.allclose(network(mixed)[:, -1], network(swapped)[:, -1], atol=1e-5)
        assert same == (attention in ORDERLESS)


def test_positions_beyond_the_learned_table_share_its_last_entry():
    network, seen = decoder("learned"), []
    network.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(torch.zeros(1, 9, dtype=torch.long))
    hidden = seen[0][0]
    assert torch.equal(hidden[5:], hidden[5:6].expand(4, -1))  # the table has six entries
    assert not torch.allclose(hidden[4], hidden[5], atol=1e-3)


def test_stretched_rotary_keeps_the_fastest_wave_and_stretches_the_slowest_with_the_window():
    width, train_length, length = 8, 16, 64
    rotary = StretchedRotary(width, train_length=train_length)
    content = torch.zeros(1, 1, length, width, dtype=torch.float64)
    content[..., : width // 2] = 1.0  # turned pairs are (cos, sin) of the phase
    turned = rotary(content, torch.arange(length))[0, 0]
    phase = torch.atan2(turned[:, width // 2 :], turned[:, : width // 2])
    assert float(phase[1, 0]) == pytest.approx(1.0)
    slowest = 10_000 ** -((width - 2) / width)
    assert float(phase[-1, -1]) == pytest.approx((length - 1) * slowest / (length / train_length))
    short = content[:, :, :train_length]
    assert torch.equal(rotary(short, torch.arange(train_length)), Rotary(width)(short, torch.arange(train_length)))


@pytest.mark.parametrize("attention", [name for name, kind in ATTENTION_KINDS.items() if kind.trained_as])
def test_kinds_trained_as_another_equal_it_up_to_the_training_length(attention):
    trained = decoder(ATTENTION_KINDS[attention].trained_as)
    reader = trained.read_as(attention)
    with torch.no_grad():
        assert torch.allclose(reader(tokens(6)), trained(tokens(6)), atol=1e-6)
        assert not torch.allclose(reader(tokens(12)), trained(tokens(12)), atol=1e-3)
    assert not reader.training


def test_leading_heads_turn_and_the_others_stay():
    rotary = LeadingHeadsRotary(4, num_rotated=2)
    content = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    turned = rotary(content, torch.arange(5))
    assert torch.equal(turned[:, 2], content[:, 2])
    assert torch.equal(turned[:, :2], Rotary(4)(content, torch.arange(5))[:, :2])


def test_growing_scores_multiply_the_score_by_the_log_of_the_position():
    torch.manual_seed(0)
    layer = GrowingScoreAttention(12, num_heads=3, train_length=4, prior=RecencyPrior(3), batch_first=True).double()
    plain = PriorAttention(12, num_heads=3, prior=RecencyPrior(3), batch_first=True).double()
    plain.load_state_dict(layer.state_dict())
    hidden = torch.randn(2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grown, _ = layer(hidden, need_weights=False, is_causal=True)
    heads = plain.project(hidden)
    factor = torch.tensor([max(1.0, math.log(2 + i) / math.log(4)) for i in range(9)], dtype=torch.float64)
    score = plain.scale * factor[:, None] * (heads.query @ heads.key.mT)
    score = score + plain.prior.dense(torch.arange(9), torch.arange(9), dtype=torch.float64)
    score = score.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -math.inf)
    expected = plain.out_proj((score.softmax(-1) @ heads.value).transpose(1, 2).flatten(2))
    assert torch.allclose(grown, expected, atol=1e-12)
    assert float(factor[3]) == pytest.approx(math.log(5) / math.log(4))  # so growth shows in the comparison


def test_growing_scores_belong_to_positions_and_not_to_lengths():
    torch.manual_seed(0)
    layer = GrowingScoreAttention(12, num_heads=3, train_length=4, batch_first=True)
    hidden = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1))
    whole = layer.project(hidden).query
    part = layer.project(hidden[:, 6:], query_positions=torch.arange(6, 9), key_positions=torch.arange(6, 9)).query
    rows = layer.project(hidden, query_positions=torch.arange(9).expand(2, -1)).query
    assert torch.allclose(whole[:, :, 6:], part, atol=1e-6)
    assert torch.allclose(whole, rows, atol=1e-6)


def test_copy_reader_starts_without_any_preference():
    network = CopyReader(CopyReaderConfig(vocabulary_size=5, embed_dim=6, num_heads=3))
    positions = torch.arange(5)
    assert float(network.prior.dense(positions, positions).detach().abs().max()) == 0.0
    assert network(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attention": "alibl"}, "attention must be one of 'goat', 'paper_goat', 'alibi'"),
        ({"attention": "goat", "embed_dim": 10}, r"embed_dim must be a multiple of 2 \* num_heads = 8; got 10"),
        ({"attention": "goat", "num_layers": 0}, "num_layers must be at least 1; got 0"),
    ],
)
def test_bad_configurations_say_what_is_wrong(arguments, says):
    with pytest.raises(ValueError, match=says):
        DecoderConfig(**arguments)


def test_weights_are_read_by_kinds_that_train_alike_alone():
    with pytest.raises(
        ValueError, match=r"attention must be one of 'rope', 'interpolated_rope', 'ntk_rope', 'yarn_rope'; got 'goat'"
    ):
        decoder("rope").read_as("goat")


def test_paper_frequencies_are_the_default():
    assert DecoderConfig("goat").max_period == pytest.approx(2 * math.pi * 10_000)


# Kinds of the ablations ---------------------------------------------------------------------------------------------


def test_narrow_lanes_are_the_exact_prior_near_the_first_token_and_far_from_it_later():
    exact = goat_prior(4, num_frequencies=2, form="paper")
    narrow = NarrowLanesPrior(exact)
    for end, low, high in ((8, 0.0, 0.05), (2048, 0.2, math.inf)):
        at = torch.arange(end - 8, end)
        forms = [prior.dense(at, at, dtype=torch.float64) for prior in (exact, narrow)]
        difference = forms[0] - forms[1]
        error = (difference - difference.mean(-1, keepdim=True)).abs().max()
        assert low <= error <= high


def test_narrow_lanes_are_what_a_kernel_gets():
    narrow, at = NarrowLanesPrior(goat_prior(4, num_frequencies=2, form="paper")), torch.arange(500, 507)
    dense = narrow.dense(at, at, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        lanes = narrow.lanes(at, at, dtype=dtype, tolerance=1e-4)
        difference = lanes.dense().double() - dense
        assert (difference - difference.mean(-1, keepdim=True)).abs().max() < 2 * lanes.error_bound
        assert lanes.error_bound < 0.02  # far below what rounding costs at these positions


def test_narrow_lanes_round_factors_and_keep_gradients():
    exact = RecencyPrior(2)
    with torch.no_grad():
        exact.strength.copy_(torch.tensor([1.003, 0.7]))
    query, key = torch.tensor([0, 300, 1001]), torch.tensor([0, 257, 1003])
    narrow = NarrowLanesPrior(exact).dense(query, key, dtype=torch.float64)
    slopes, sides = exact.slopes.bfloat16().double(), [at.bfloat16().double() for at in (query, key)]
    expected = slopes[:, None, None] * (sides[1] - sides[0][:, None])
    assert torch.equal(narrow, expected)
    (found,) = torch.autograd.grad(narrow.sum(), [exact.strength])
    lags = (sides[1] - sides[0][:, None]).sum()
    assert torch.allclose(found.double(), lags * torch.tensor(exact.unit_slopes, dtype=torch.float64), rtol=1e-6)


def test_narrow_lanes_refuse_tables():
    with pytest.raises(ValueError, match="NarrowLanesPrior: prior must be bilinear; got 'KeyTablePrior'"):
        NarrowLanesPrior(KeyTablePrior(2, 8))


def test_decaying_waves_are_in_a_group_with_decay():
    decays = {}
    for attention in ("paper_goat", "decaying_waves"):
        network = decoder(attention)
        groups = parameter_groups(network, TrainingConfig(steps=1, batch_size=1, weight_decay=0.3))
        waves = {id(p) for block in network.blocks for p in block.attention.prior.parts[0].parameters()}
        decays[attention] = {group["weight_decay"] for group in groups for p in group["params"] if id(p) in waves}
    assert decays == {"paper_goat": {0.0}, "decaying_waves": {0.3}}


@pytest.mark.parametrize("kind", ["forgetting", "alibi_goat_forgetting"])
def test_graphs_of_gates_hold_no_scan(kind):
    """Inductor of PyTorch 2.11 fails on scans of float64, and their backward is one as well."""
    network = decoder(kind)
    for graph in graphs_of(network, tokens(6)):
        assert graph["eotattn.running_sums.default"] == len(network.blocks)
        assert not [target for target in graph if "cum" in target or "scan" in target]


def test_gates_train_with_the_content_and_sinks_with_the_priors():
    network = decoder("alibi_goat_forgetting")
    content, nats = ({id(p) for p in part} for part in split_by_rate(network))
    for block in network.blocks:
        *static, gates = block.attention.prior.parts
        assert {id(p) for part in static for p in part.parameters()} <= nats
        assert {id(p) for p in gates.parameters()} <= content
    assert not content & nats
    network = decoder("rope_sink_logit", 1)
    assert [tuple(p.shape) for p in split_by_rate(network)[1]] == [(3,)]
