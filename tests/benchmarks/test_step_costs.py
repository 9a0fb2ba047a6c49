"""The model of costs: operations against PyTorch's own counter, bytes against messages sent one by one."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from eotattn.benchmarks.step_costs import DecoderSizes, Machine, step_cost, stored_table, with_appended
from eotattn.experiments.networks import Decoder, DecoderConfig

SIZES = DecoderSizes(layers=3, width=96, heads=6, vocabulary=50)
MACHINE = Machine(matrix_rate=5e12, attention_rate=3e12, near=7e9, far=1e9, host=4)


def decoder(length):
    return Decoder(
        DecoderConfig("none", 50, num_layers=3, embed_dim=96, num_heads=6, train_length=length, block="llama")
    )


def test_parameters_are_those_of_the_decoder():
    assert SIZES.parameters == sum(p.numel() for p in decoder(16).parameters())
    paper = DecoderSizes(layers=12, width=768, heads=12, vocabulary=16_384)
    assert paper.parameters == 110_119_680


@pytest.mark.parametrize("recompute", [False, True])
def test_operations_are_those_that_pytorch_counts(recompute):
    length, batch, network = 24, 2, decoder(24)
    for block in network.blocks if recompute else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    tokens = torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), set_checkpoint_early_stop(False):
        network(tokens).square().sum().backward()
    # PyTorch counts whole squares of scores, and not those that fused kernels compute again in the backward pass.
    squares = 2 * SIZES.attention_operations(length, recompute=recompute) - 2 * SIZES.layers * length * SIZES.width
    expected = batch * length * (SIZES.matrix_operations(recompute=recompute) + squares)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("ring", [1, 2, 5])
def test_bytes_of_a_ring_are_those_of_its_messages(ring):
    length, sizes = 40, replace(SIZES, kv_heads=2, appended=8)
    shard = length // ring
    key, value = shard * 2 * (16 + 8), shard * 2 * 16
    sent = 0
    for _ in range(sizes.layers):
        for _ in range(ring - 1):  # every shard goes on to all the others, in both passes
            sent += 2 * 2 * (key + value)
        for _ in range(ring if ring > 1 else 0):  # gradients follow, and come home
            sent += 4 * (key + value)
    assert sizes.ring_bytes(length, ring) == pytest.approx(sent)
    once_more = sizes.layers * (ring - 1) * 2 * (key + value)
    assert sizes.ring_bytes(length, ring, recompute=True) == pytest.approx(sent + once_more)


def test_times_are_operations_and_bytes_over_rates():
    cost = step_cost(SIZES, MACHINE, length=64, tokens=64 * 8, gpus=8, ring=4)
    assert cost.matrices == pytest.approx(64 * SIZES.matrix_operations() / 5e12)
    assert cost.attention == pytest.approx(64 * SIZES.attention_operations(64) / 3e12)
    assert cost.ring == pytest.approx(4 * SIZES.ring_bytes(64, 4) / 7e9)  # four sequences a ring, within a host
    # A ring of eight sums chunks in seven messages and hands the sums on in seven.
    assert cost.gradients == pytest.approx(14 * (SIZES.parameters / 8) * 4 / 1e9)
    assert cost.least == max(cost.matrices + cost.attention, cost.ring + cost.gradients)
    assert cost.most == pytest.approx(cost.matrices + cost.attention + cost.ring + cost.gradients)
    # Per block 16 numbers of a quarter of the inputs, then keys and values of 64 tokens and their gradients.
    assert cost.kept_gib * 2**30 == pytest.approx(3 * 16 * 96 * 2 + 64 * 2 * 96 * (2 + 4))
    sharded = step_cost(SIZES, MACHINE, length=64, tokens=64 * 8, gpus=8, ring=4, sharded=True)
    assert sharded.state_gib == pytest.approx(cost.state_gib / 8)


def test_appended_lanes_slow_attention_by_what_was_measured():
    wider, slower = with_appended(SIZES, MACHINE, columns=16, slowdown=1.4)
    plain, appended = (
        step_cost(sizes, machine, length=64, tokens=64, gpus=1)
        for sizes, machine in ((SIZES, MACHINE), (wider, slower))
    )
    assert appended.attention == pytest.approx(1.4 * plain.attention)
    assert appended.matrices == plain.matrices
    assert wider.ring_bytes(64, 4) == pytest.approx(1.5 * SIZES.ring_bytes(64, 4))  # 16 columns beside 2 x 16


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ring": 3}, "ring must divide gpus = 8"),
        ({"tokens": 100}, "tokens must be a multiple of length times rings, 512"),
    ],
)
def test_uneven_shares_are_refused(changes, says):
    with pytest.raises(ValueError, match=f"step_cost: {says}"):
        step_cost(SIZES, MACHINE, **({"length": 64, "tokens": 512, "gpus": 8} | changes))


def test_tables_are_read_or_missing(tmp_path):
    assert stored_table(tmp_path, "bench_ring") is None
    (tmp_path / "bench_ring.csv").write_text("name,median_ms,error\nSDPA,1.5,\n")
    assert stored_table(tmp_path, "bench_ring") == [{"name": "SDPA", "median_ms": 1.5}]
