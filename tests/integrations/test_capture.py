"""Capture of PyTorch's own attention and of eotattn modules; selection, errors, clean exits."""

import math

import pytest
import torch
from tolerances import assert_close
from torch import nn
from torch.nn import functional

from eotattn import PriorAttention, RecencyPrior, SinkPrior
from eotattn.attention.observers import OBSERVERS
from eotattn.integrations import capture
from eotattn.integrations.torch_calls import TorchCalls

L, E, H = 9, 12, 3


@pytest.fixture
def tokens():
    return torch.randn(2, L, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def multihead(seed=0, **options):
    torch.manual_seed(seed)
    layer = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        layer.in_proj_weight.mul_(3)
    return layer


class Fused(nn.Module):
    """Two layers that call the fused function in their own way."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Fused.Layer(causal) for causal in (True, False))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

    class Layer(nn.Module):
        def __init__(self, causal):
            super().__init__()
            self.causal = causal

        def forward(self, x):
            heads = x.unflatten(-1, (H, -1)).transpose(1, 2)
            output = functional.scaled_dot_product_attention(2 * heads, heads, heads, is_causal=self.causal, scale=0.9)
            return output.transpose(1, 2).flatten(2)


class Manual(nn.Module):
    """Attention that nobody can see from outside."""

    def forward(self, x):
        return torch.softmax(x @ x.mT, -1) @ x


def masses(weights):
    """Sums over the rows of dense weights (B, H, L, L)."""
    return weights.sum(-2), -torch.special.xlogy(weights, weights).sum((-1, -2))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", ["none", "causal", "padding", "both"])
def test_multihead_attention(tokens, need_weights, masked):
    layer = multihead()
    options = {}
    if masked in ("causal", "both"):
        options["attn_mask"] = torch.ones(L, L, dtype=torch.bool).triu(1)
    if masked in ("padding", "both"):
        options["key_padding_mask"] = torch.arange(L) >= torch.tensor([[L], [L - 3]])
    expected, weights = layer(tokens, tokens, tokens, average_attn_weights=False, **options)
    with capture(layer) as captured:
        actual, returned = layer(
            tokens, tokens, tokens, need_weights=need_weights, average_attn_weights=False, **options
        )
    assert_close(actual, expected)
    assert (returned is not None) == need_weights
    (stats,) = captured.layers.values()
    real = ~options.get("key_padding_mask", torch.zeros(2, L, dtype=torch.bool))
    columns, entropy = masses(weights.detach() * real[:, None, :, None])
    assert torch.equal(stats.num_queries, real.sum(-1).double())
    assert_close(stats.column_mass, columns, tolerance=1e-10)
    assert_close(stats.sums["entropy"], entropy, tolerance=1e-10)


def test_fused_calls_are_named_and_unchanged(tokens):
    model = Fused()
    expected = model(tokens)
    with capture(model) as captured:
        actual = model(tokens)
    assert torch.equal(actual, expected)
    assert list(captured.layers) == ["layers.0", "layers.1"]
    heads = tokens.unflatten(-1, (H, -1)).transpose(1, 2)
    score = (1.8 * heads @ heads.mT).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -math.inf)
    columns, entropy = masses(torch.softmax(score, -1))
    assert_close(captured.layers["layers.0"].column_mass, columns, tolerance=1e-10)
    assert_close(captured.layers["layers.0"].sums["entropy"], entropy, tolerance=1e-10)
    assert captured.layers["layers.1"].column_count.min() == L


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_prior_attention_tells_content_from_prior(tokens, backend):
    torch.manual_seed(1)
    prior = RecencyPrior(H) + SinkPrior(H)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter))
    layer = PriorAttention(E, H, prior=prior, backend=backend, batch_first=True, dtype=torch.float64).eval()
    expected, _ = layer(tokens, need_weights=False, is_causal=True)
    rows = {}
    with capture(layer, on_rows=rows.__setitem__) as captured:
        actual, _ = layer(tokens, need_weights=False, is_causal=True)
    assert torch.equal(actual, expected)
    (name,) = captured.layers
    assert captured.priors[name] is layer.prior
    content = layer.project(tokens)
    score = layer.scale * content.query @ content.key.mT
    dense = prior.dense(torch.arange(L), torch.arange(L), dtype=torch.float64)
    logits = score + dense
    for i in range(1, L):
        rival = 1 + logits[..., i, 1 : i + 1].argmax(-1)
        for part, table in (("margin", logits), ("content_margin", score), ("prior_margin", dense.expand_as(score))):
            row = table[..., i, :]
            wanted = row[..., 0] - row.gather(-1, rival.unsqueeze(-1)).squeeze(-1)
            assert_close(getattr(rows[name], part)[..., i], wanted, tolerance=1e-10)
    assert captured.layers[name].margin_sums["prior_margin"].abs().min() > 0


def test_prior_attention_decodes_with_a_cache(tokens):
    torch.manual_seed(1)
    layer = PriorAttention(E, H, prior=RecencyPrior(H), batch_first=True, dtype=torch.float64).eval()
    with capture(layer) as at_once:
        layer(tokens, need_weights=False, is_causal=True)
    cache = layer.make_cache(2, L)
    with torch.no_grad(), capture(layer) as stepwise:
        for start, stop in ((0, 5), (5, 6), (6, L)):
            layer(tokens[:, start:stop], need_weights=False, is_causal=True, cache=cache)
    (whole,), (steps,) = at_once.layers.values(), stepwise.layers.values()
    assert steps.num_sequences == 2
    for name in whole.sums:
        assert_close(steps.sums[name], whole.sums[name], tolerance=1e-10)
    assert_close(steps.column_mass, whole.column_mass, tolerance=1e-10)
    assert_close(steps.lag_mass, whole.lag_mass, tolerance=1e-10)


def test_prompts_accumulate(tokens):
    layer = multihead()
    with capture(layer) as captured:
        layer(tokens, tokens, tokens)
        layer(tokens[:1, :4], tokens[:1, :4], tokens[:1, :4])
    (stats,) = captured.layers.values()
    assert stats.num_queries.tolist() == [L, L, 4]


def test_layers_and_heads_are_selected(tokens):
    model = Fused()
    with capture(model) as everything:
        model(tokens)
    for layers in (["layers.1"], [1]):
        with capture(model, layers=layers, heads=[2]) as captured:
            model(tokens)
        assert list(captured.layers) == ["layers.1"]
        wanted = everything.layers["layers.1"].sums["entropy"][:, [2]]
        assert torch.equal(captured.layers["layers.1"].sums["entropy"], wanted)


class Cached(nn.Module):
    """Plain attention with a cache of its own."""

    def __init__(self):
        super().__init__()
        self.cache = torch.zeros(0)

    def forward(self, x):
        heads = x.unflatten(-1, (H, -1)).transpose(1, 2)
        first = self.cache.numel() == 0
        self.cache = heads if first else torch.cat([self.cache, heads], 2)
        return functional.scaled_dot_product_attention(2 * heads, self.cache, self.cache, is_causal=first)


def test_a_cache_of_plain_attention_continues_its_sequences(tokens):
    model, whole_model = Cached(), Cached()
    with capture(model) as captured:
        for _ in range(2):  # two prompts, each decoded
            model.cache = torch.zeros(0)
            for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
                model(tokens[:, start:stop])
    with capture(whole_model) as whole:
        whole_model(tokens)
    steps, once = captured.layers["Cached"], whole.layers["Cached"]
    assert steps.num_sequences == 4
    for chosen in ([0, 1], [2, 3]):
        part = steps.sequences(torch.tensor(chosen))
        assert torch.equal(part.num_queries, once.num_queries)
        assert_close(part.lag_mass, once.lag_mass, tolerance=1e-10)
        assert_close(part.column_mass, once.column_mass, tolerance=1e-10)


def test_single_queries_of_other_sequences_are_no_cache(tokens):
    class Pooled(nn.Module):
        def forward(self, x):
            return functional.scaled_dot_product_attention(x[:, None, :1], x[:, None], x[:, None])

    with capture(model := Pooled()) as captured:
        for length in (4, 5, 6):
            model(tokens[:, :length])
    assert captured.layers["Pooled"].num_sequences == 6


@pytest.mark.parametrize("form", ["multihead", "multihead and causal", "mask of keys"])
def test_queries_that_are_padding_do_not_count(tokens, form):
    padding = torch.zeros(2, L, dtype=torch.bool)
    padding[0, :2] = padding[1, -3:] = True

    class Masked(nn.Module):
        def forward(self, x):
            heads = x.unflatten(-1, (H, -1)).transpose(1, 2)
            return functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=~padding[:, None, None])

    model = Masked() if form == "mask of keys" else multihead()
    causal = torch.ones(L, L, dtype=torch.bool).triu(1) if "causal" in form else None
    options = {"key_padding_mask": padding, "attn_mask": causal, "need_weights": False}
    with capture(model) as captured:
        if form == "mask of keys":
            model(tokens)
        else:
            model(tokens, tokens, tokens, **options)
    layer = next(iter(captured.layers.values()))
    assert layer.num_queries.tolist() == [L - 2, L - 3]
    assert_close(layer.column_mass.sum(-1), layer.num_queries[:, None].expand(2, H), tolerance=1e-10)
    assert (layer.column_mass[0, :, : L - 2] > 0).all(), "columns count from the first real token"
    assert (layer.column_mass[1, :, L - 3 :] == 0).all()


class Shared(nn.Module):
    """One block, run three times on its own output."""

    def __init__(self):
        super().__init__()
        self.block = Fused.Layer(causal=True)

    def forward(self, x):
        for _ in range(3):
            x = self.block(x)
        return x


def test_passes_of_shared_weights_are_layers(tokens):
    model = Shared()
    with capture(model) as captured:
        model(tokens)
        model(tokens)
    assert list(captured.layers) == ["block", "block (pass 2)", "block (pass 3)"]
    assert {stats.num_sequences for stats in captured.layers.values()} == {4}
    second = Fused.Layer(causal=True)
    with capture(second) as alone:
        second(second(tokens))
        second(tokens)
    assert alone.layers["Layer"].num_sequences == 6, "what is called from outside is a sequence of its own"
    for layers, names in ((["block"], list(captured.layers)), ([2], ["block (pass 3)"])):
        with capture(model, layers=layers) as chosen:
            model(tokens)
        assert list(chosen.layers) == names


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [0, 7]}, ValueError, r"capture: layers must be among \{0: layers.0, 1: layers.1\}; got \[7\]"),
        ({"heads": [3]}, ValueError, r"capture: heads must name heads from 0 to 2 of layer 'layers.0'; got \[3\]"),
        ({"sink_positions": ()}, ValueError, r"capture: sink_positions must name at least one key"),
        ({"sink_positions": (-1,)}, ValueError, r"capture: sink_positions must be at least 0"),
    ],
)
def test_unknown_layers_heads_and_keys_are_named(tokens, options, error, message):
    model = Fused()
    with pytest.raises(error, match=message), capture(model, **options):
        model(tokens)


def test_a_model_is_a_module():
    with pytest.raises(TypeError, match=r"capture: model must be a module"), capture("bert"):
        pass


def test_unsupported_models_raise_and_name_what_was_tried(tokens):
    model = Manual()
    tried = r"no attention call arrived\. Tried the attention interface.*eotattn\.prior_attention.*scaled_dot_product"
    with pytest.raises(NotImplementedError, match=tried), capture(model):
        model(tokens)


def test_a_model_that_never_ran_is_no_error():
    with capture(Manual()) as captured:
        pass
    assert captured.layers == {}


def test_misunderstood_attention_raises(tokens, monkeypatch):
    model = Fused()
    original = TorchCalls._fused

    def halved(self, func, *args, **kwargs):
        return original(self, lambda *a, **k: 0.5 * func(*a, **k), *args, **kwargs)

    monkeypatch.setattr(TorchCalls, "_fused", halved)
    with pytest.raises(NotImplementedError, match=r"layer 'layers.0' does more than softmax"), capture(model):
        model(tokens)


def test_an_exception_leaves_nothing_behind(tokens):
    model = Fused()
    fused = functional.scaled_dot_product_attention

    def stop(*_):
        raise RuntimeError("stop")

    def interrupted():
        with capture(model) as captured:
            seen.append(captured)
            model(tokens)
            model.layers[1].register_forward_pre_hook(stop)
            model(tokens)

    seen = []
    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert OBSERVERS == []
    assert functional.scaled_dot_product_attention is fused
    assert len(model.layers[0]._forward_hooks) == 0
    assert seen[0].layers["layers.0"].num_sequences == 4  # finished calls are kept
    assert seen[0].recorder.frames.stack == []


def test_nested_captures_see_the_same_calls_and_leave_nothing_behind(tokens):
    model, before = Fused(), functional.scaled_dot_product_attention
    alone = model(tokens)
    with capture(model) as outer:
        with capture(model, layers=[0]) as inner:
            both = model(tokens)
        again = model(tokens)
    assert torch.equal(both, alone)
    assert torch.equal(again, alone)
    assert functional.scaled_dot_product_attention is before
    assert [len(seen.layers) for seen in (outer, inner)] == [2, 1]
    ((name, once),) = inner.layers.items()
    assert once.num_sequences == len(tokens)
    assert outer.layers[name].num_sequences == 2 * len(tokens)
