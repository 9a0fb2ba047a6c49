"""Streamed value statistics against loops over the dense definitions."""

import pytest
import torch
from head_oracles import is_dormant, sink_kind, stable_rank
from tolerances import assert_close

from eotattn.diagnostics.value_statistics import ValueStatistics, value_drain

B, H, L, V, E = 3, 4, 12, 3, 7


@pytest.fixture
def call():
    """Heads: a no-operation (which is dormant), no sink, a broadcast, dormant; two heads share a key head."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(B, 2, L, V, generator=generator, dtype=torch.float64)
    value[:, 0, 0] *= 0.01
    weight = torch.randn(E, H * V, generator=generator, dtype=torch.float64)
    weight[:, 3 * V :] *= 1e-3
    weights = torch.softmax(torch.randn(B, H, L, L, generator=generator, dtype=torch.float64), -1)
    weights[:, [0, 2], :, 0] += 30.0
    weights = weights / weights.sum(-1, keepdim=True)
    output = weights @ value.repeat_interleave(2, 1)
    everything = torch.ones(B, L, dtype=torch.bool)
    streamed = ValueStatistics.of(value, output, weight, weights[..., 0], real=everything, counted=everything)
    return value, weight, weights, output, streamed


def test_value_drain_is_the_norm_of_the_projected_value():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 2, 5, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 4 * 3, generator=generator, dtype=torch.float64)
    drain = value_drain(value, weight)
    for h in range(4):
        projected = value[:, h // 2] @ weight[:, 3 * h : 3 * h + 3].mT
        assert_close(drain[:, h], projected.norm(dim=-1), tolerance=1e-10)
    with pytest.raises(ValueError, match=r"value_drain: output_weight must have shape \(E, multiple of 6\)"):
        value_drain(value, weight[:, :7])


def test_means_are_those_of_loops(call):
    value, weight, _, output, streamed = call
    for b in range(B):
        for h in range(H):
            block = weight[:, h * V : (h + 1) * V]
            drains = torch.stack([(block @ value[b, h // 2, j]).norm() for j in range(L)])
            written = torch.stack([(block @ output[b, h, i]).norm() for i in range(L)])
            assert_close(streamed.drain[b, h], drains.mean(), tolerance=1e-10)
            assert_close(streamed.sink_drain[b, h], drains[0], tolerance=1e-10)
            assert_close(streamed.contribution[b, h], written.mean(), tolerance=1e-10)
    assert_close(streamed.stable_rank, stable_rank(output), tolerance=1e-10)


def test_classes_are_those_of_the_dense_forms(call):
    value, weight, weights, output, streamed = call
    drain = value_drain(value, weight)
    kinds = [[sink_kind(weights[b, h], drain[b, h], output[b, h]) for h in range(H)] for b in range(B)]
    for b in range(B):
        for h in range(H):
            assert bool(streamed.is_sink[b, h]) == (kinds[b][h] != "none")
            assert bool(streamed.is_no_operation[b, h]) == (kinds[b][h] == "no-operation")
            assert bool(streamed.is_broadcast[b, h]) == (kinds[b][h] == "broadcast")
    assert {kind for row in kinds for kind in row} >= {"none", "no-operation", "broadcast"}
    by_head = weight.unflatten(-1, (H, V)).movedim(1, 0)
    assert torch.equal(streamed.is_dormant, is_dormant(output @ by_head.mT))
    assert streamed.is_dormant.tolist() == [[True, False, False, True]] * B


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(call, side):
    value, weight, weights, output, _ = call
    short = L - 4
    kept = slice(4, L) if side == "left" else slice(0, short)
    real = torch.zeros(B, L, dtype=torch.bool)
    real[:, kept] = True
    at = 4 if side == "left" else 0
    padded = ValueStatistics.of(value, output, weight, weights[..., at], real=real, counted=real)
    everything = torch.ones(B, short, dtype=torch.bool)
    cut = (value[:, :, kept], output[:, :, kept], weight, weights[:, :, kept, at])
    alone = ValueStatistics.of(*cut, real=everything, counted=everything)
    for name in ("drain", "sink_drain", "sink_queries", "stable_rank", "contribution"):
        assert_close(getattr(padded, name), getattr(alone, name), tolerance=1e-10)


def test_a_sequence_without_the_key_has_no_drain_of_it(call):
    value, weight, weights, output, _ = call
    real = torch.zeros(B, L, dtype=torch.bool)
    real[:, :2] = True
    found = ValueStatistics.of(value, output, weight, weights[..., 2], real=real, counted=real, key=2)
    assert found.sink_drain.isnan().all()
    assert not found.is_no_operation.any()


def test_sequences_add_up_and_select(call):
    *_, streamed = call
    both = streamed + streamed.sequences(torch.tensor([0]))
    assert both.num_sequences == B + 1
    assert_close(both.drain[-1], streamed.drain[0])
    assert_close(both.heads([2]).drain[:, 0], both.drain[:, 2])


def test_bad_shapes_are_named(call):
    value, weight, weights, output, _ = call
    everything = torch.ones(B, L, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"ValueStatistics: real must have shape \(3, 12\)"):
        ValueStatistics.of(value, output, weight, weights[..., 0], real=everything[:, :5], counted=everything)
    with pytest.raises(ValueError, match=r"value_drain: output_weight must have shape"):
        ValueStatistics.of(value, output, weight[:, :7], weights[..., 0], real=everything, counted=everything)
