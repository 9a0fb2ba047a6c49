"""The strongest keys of every query, against whole tables of weights."""

import pytest
import torch

from eotattn.attention.statistics import score_rows
from eotattn.attention.statistics.score_rows import ScoreRows, WeightRows
from eotattn.diagnostics import TopKeys
from eotattn.integrations import capture


def weights_of(query, key, *, sink=None):
    """Causal softmax, as one would write it."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if sink is None:
        return scores.softmax(-1)
    logits = sink[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, logits], -1).softmax(-1)[..., :-1]


@pytest.fixture
def call():
    return torch.randn(2, 2, 3, 11, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("sink", [None, torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)])
def test_kept_keys_are_the_largest_weights(call, sink):
    query, key = call
    source = ScoreRows(query, key, scale=0.5, is_causal=True)
    top = TopKeys.of(source, rows=9, count=2, sink_logits=sink)
    wanted = weights_of(query, key, sink=sink)[:, :, :9].topk(2)
    torch.testing.assert_close(top.weight, wanted.values.float(), atol=1e-6, rtol=0)
    there = wanted.values > 0
    assert torch.equal(top.key[there].long(), wanted.indices[there])
    assert torch.equal(top.heads([2]).weight, top.weight[:, [2]])


def test_blocks_of_a_window_begin_late(call, monkeypatch):
    monkeypatch.setitem(score_rows.BLOCK_ELEMENTS, "cpu", 1)  # a row a block
    query, key = call
    top = TopKeys.of(ScoreRows(query, key, scale=0.5, is_causal=True, window=3), rows=11)
    at = torch.arange(11)
    lag = at[:, None] - at
    scores = (query @ key.transpose(-1, -2) * 0.5).masked_fill((lag < 0) | (lag > 2), -torch.inf)
    torch.testing.assert_close(top.dense(11), scores.softmax(-1).float(), atol=1e-6, rtol=0)


def test_all_keys_are_the_table(call):
    query, key = call
    table = weights_of(query, key)
    top = TopKeys.of(WeightRows(table), rows=11, count=11)
    torch.testing.assert_close(top.dense(11), table.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(top.dense(5), table.float()[..., :5], atol=1e-6, rtol=0)


def test_texts_of_different_lengths_add_up(call):
    table = weights_of(*call)
    short, long = TopKeys.of(WeightRows(table[..., :3, :3])), TopKeys.of(WeightRows(table))
    both = short + long
    assert both.key.shape == (4, 3, 11, 4)
    torch.testing.assert_close(both.dense(11)[:2, :, :3, :3], table[..., :3, :3].float(), atol=1e-6, rtol=0)
    assert float(both.weight[:2, :, 3:].abs().max()) == 0
    assert torch.equal(both.weight[2:], long.weight)


def test_a_capture_keeps_them_where_that_is_asked_for():
    torch.manual_seed(0)
    layer, x = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64), torch.randn(1, 6, 8).double()
    with torch.no_grad(), capture(layer, heads=[1], top_key_rows=4) as captured:
        layer(x, x, x)
    (top,) = captured.top_keys.values()
    wanted = layer(x, x, x, average_attn_weights=False)[1][:, [1], :4].topk(4)
    torch.testing.assert_close(top.weight, wanted.values.float().detach(), atol=1e-6, rtol=0)
    assert torch.equal(top.key.long(), wanted.indices)
    with torch.no_grad(), capture(layer) as captured:
        layer(x, x, x)
    assert captured.top_keys == {}
    with pytest.raises(ValueError, match="capture: top_key_rows must be at least 0"), capture(layer, top_key_rows=-1):
        pass


@pytest.mark.filterwarnings("ignore:capture. these layers compute softmax by hand")
def test_models_that_return_their_weights_show_pairs_and_repeats_too():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "rotary_dim": 4}
    model = transformers.GPTJModel(transformers.GPTJConfig(**sizes, attn_implementation="eager")).eval()
    ids = torch.tensor([[1, 2, 3, 1, 2, 3]])
    with torch.no_grad(), capture(model, top_key_rows=6, token_scores=True) as captured:
        model(ids)
    weights = model(ids, output_attentions=True).attentions[0].detach()
    (top,), (scores,) = captured.top_keys.values(), captured.token_scores.values()
    torch.testing.assert_close(top.weight[..., 0], weights.amax(-1), atol=1e-6, rtol=0)
    duplicate = torch.stack([weights[..., i, i - 3] for i in (3, 4, 5)]).mean(0)
    torch.testing.assert_close(scores.duplicate, duplicate.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"count": 0}])
def test_sizes_are_positive(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"TopKeys: {name} must be at least 1"):
        TopKeys.of(WeightRows(torch.full((1, 1, 2, 2), 0.5)), **wrong)
