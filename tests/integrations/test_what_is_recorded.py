"""Only the modules asked for are recorded, every token once, and what is not seen is named."""

import warnings

import pytest
import torch
from families import BY_NAME, GPT2, GROUPED, SIZES, T5, Family
from tolerances import assert_close
from torch import nn
from torch.nn import functional

from eotattn.integrations import capture

L, E, H = 9, 12, 3
PADDED = [11, 9, 7]


@pytest.fixture
def tokens():
    return torch.randn(2, L, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def family(name, model, config, settings, kind="decoder", **options):
    pytest.importorskip("transformers")
    return Family(name, model, config, settings, kind, **options)


def counts(captured):
    return {name: stats.num_queries.tolist() for name, stats in captured.layers.items()}


@torch.no_grad()
def test_a_model_that_shares_the_configuration_is_not_recorded():
    pytest.importorskip("transformers")
    model, inputs = BY_NAME["llama"].build(), BY_NAME["llama"].inputs()
    other = type(model)(model.config).eval()
    expected = other(**inputs).logits
    with capture(model) as captured:
        model(**inputs)
        actual = other(**inputs).logits
    assert torch.equal(actual, expected)
    assert list(captured.layers) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert {stats.num_sequences for stats in captured.layers.values()} == {3}


@torch.no_grad()
def test_a_part_of_a_model_is_recorded_alone():
    pytest.importorskip("transformers")
    model, inputs = BY_NAME["bart"].build(), BY_NAME["bart"].inputs()
    with capture(model.encoder) as captured:
        model(**inputs)
    assert list(captured.layers) == ["layers.0.self_attn", "layers.1.self_attn"]


class Twice(nn.Module):
    """Attends twice in one run: the difference of two maps."""

    def forward(self, x):
        heads = x.unflatten(-1, (H, -1)).transpose(1, 2)
        first, second = (
            functional.scaled_dot_product_attention(scale * heads, heads, heads, is_causal=True) for scale in (2, 0.5)
        )
        return (first - second).transpose(1, 2).flatten(2)


class Parts(nn.Module):
    """Attends to one image after the other, as vision models do whose images are packed."""

    def forward(self, x):
        heads = x[:1].unflatten(-1, (H, -1)).transpose(1, 2)
        parts = [functional.scaled_dot_product_attention(part, part, part) for part in heads.split([4, 2, 3], dim=2)]
        return torch.cat(parts, 2).transpose(1, 2).flatten(2)


class HeadByHead(nn.Module):
    """Attends head after head."""

    def forward(self, x):
        heads = x.unflatten(-1, (H, -1)).transpose(1, 2).contiguous()
        parts = [functional.scaled_dot_product_attention(part, part, part) for part in heads.split(1, dim=1)]
        return torch.cat(parts, 1).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Twice(), {"Twice": [L] * 4, "Twice (call 2)": [L] * 4}),
        (HeadByHead(), {f"HeadByHead{call}": [L] * 4 for call in ("", " (call 2)", " (call 3)")}),
        (Parts(), {"Parts": [4, 2, 3] * 2}),
    ],
    ids=["twice", "head by head", "parts"],
)
def test_calls_of_one_run_are_layers_and_parts_of_one_tensor_are_sequences(tokens, model, expected):
    with capture(model) as captured:
        model(tokens)
        model(tokens)
    assert counts(captured) == expected
    with capture(model, layers=[list(expected)[-1]]) as chosen:
        model(tokens)
    assert list(chosen.layers) == [list(expected)[-1]]


SWITCH = {**T5, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2}


@torch.no_grad()
def test_padding_counts_where_it_arrives_as_a_plain_tensor():
    switch = family("switch", "SwitchTransformersEncoderModel", "SwitchTransformersConfig", SWITCH, "encoder", gain=1)
    model = switch.build()
    with capture(model) as captured:
        model(**switch.inputs("right"))
    assert list(counts(captured).values()) == [PADDED, PADDED]


@torch.no_grad()
def test_keys_before_the_tokens_of_an_encoder_move_the_padding():
    """As prefix tuning puts them there: the padding mask is as long as the keys."""
    transformers = pytest.importorskip("transformers")
    model, inputs = BY_NAME["bert"].build(), BY_NAME["bert"].inputs("right")
    prefix = transformers.DynamicCache()
    for layer in range(2):
        prefix.update(torch.ones(3, 4, 5, 8), torch.ones(3, 4, 5, 8), layer)
    inputs["attention_mask"] = functional.pad(inputs["attention_mask"], (5, 0), value=1)
    with capture(model) as captured:
        for layer in model.encoder.layer:
            layer.is_decoder = layer.attention.self.is_decoder = True
        model(**inputs, past_key_values=prefix)
    assert list(counts(captured).values()) == [PADDED, PADDED]
    for stats in captured.layers.values():
        assert stats.lag_mass[..., : stats.max_lag - 5].sum() > 0, "the first token looks ahead"


@torch.no_grad()
def test_layers_that_never_arrive_are_named():
    local = family("longt5", "LongT5ForConditionalGeneration", "LongT5Config", {**T5, "local_radius": 3}, "seq2seq")
    model = local.build()
    message = r"no call of theirs was seen: encoder\.block\.0\.layer\.0\.LocalSelfAttention, encoder\.block\.1"
    with pytest.warns(UserWarning, match=message), capture(model) as captured:
        model(**local.inputs())
    assert len(captured.unseen) == 2
    assert len(captured.layers) == 4


class Manual(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = ManualAttention()

    def forward(self, x):
        return self.attention(x)


class ManualAttention(nn.Module):
    def forward(self, x):
        return torch.softmax(x @ x.mT, -1) @ x


def test_what_looks_like_attention_is_named_where_nothing_arrives(tokens):
    model = Manual()
    with pytest.raises(NotImplementedError, match=r"Modules that look like attention: attention\."), capture(model):
        model(tokens)


BLOOM = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}
DEBERTA = {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
NEO = {**SIZES, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4}
BY_HAND = {
    "gpt-j": ("GPTJForCausalLM", "GPTJConfig", {**GPT2, "rotary_dim": 4}),
    "bloom": ("BloomForCausalLM", "BloomConfig", BLOOM),
    "falcon": ("FalconForCausalLM", "FalconConfig", SIZES),
    "gpt-neo": ("GPTNeoForCausalLM", "GPTNeoConfig", NEO),
    "deberta": ("DebertaV2Model", "DebertaV2Config", DEBERTA, "encoder"),
}


@pytest.mark.parametrize("name", BY_HAND)
@torch.no_grad()
def test_softmax_by_hand_is_watched_through_the_weights_that_modules_return(name):
    by_hand = family(name, *BY_HAND[name])
    model, inputs = by_hand.build(), by_hand.inputs("left" if by_hand.is_causal else "right")
    expected, maps = model(**inputs), model(**inputs, output_attentions=True).attentions
    with pytest.warns(UserWarning, match="compute softmax by hand"), capture(model) as captured:
        actual = model(**inputs)
    assert torch.equal(actual[0], expected[0])
    assert actual.keys() == expected.keys(), "the model returns what it was asked for"
    assert captured.from_weights == tuple(captured.layers)
    assert captured.values == {}
    real = inputs["attention_mask"].bool()
    for stats, weights in zip(captured.layers.values(), maps, strict=True):
        p = weights.double() * real[:, None, :, None]
        assert stats.num_queries.tolist() == PADDED
        assert_close(stats.sums["entropy"], -torch.special.xlogy(p, p).sum((-1, -2)), tolerance=1e-5)


@torch.no_grad()
def test_a_model_that_compares_the_name_of_its_attention_still_takes_its_fused_path():
    falcon = family("falcon", *BY_HAND["falcon"])
    model, inputs = falcon.build("sdpa"), falcon.inputs("left")
    expected = model(**inputs).logits
    with capture(model) as captured:
        actual = model(**inputs).logits
    assert torch.equal(actual, expected)
    assert captured.from_weights == ()
    assert len(captured.values) == 2


@torch.no_grad()
def test_cached_decoding_by_hand_continues_its_sequences():
    by_hand = family("gpt-j", *BY_HAND["gpt-j"])
    model, inputs = by_hand.build(), by_hand.inputs("left")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    with pytest.warns(UserWarning, match="by hand"), capture(model) as captured:
        model.generate(**inputs, **options)
    assert list(counts(captured).values()) == [[14, 12, 10]] * 2


@torch.no_grad()
def test_weights_of_sparse_attention_are_not_taken_for_dense_ones():
    """Longformer returns (B, L, H, window) weights, whose rows sum to one too."""
    settings = {**SIZES, "attention_window": 4}
    sparse = family("longformer", "LongformerModel", "LongformerConfig", settings, "encoder")
    model = sparse.build()
    with pytest.raises(NotImplementedError, match=r"look like attention: encoder\.layer\.0"), capture(model):
        model(**sparse.inputs())


@torch.no_grad()
def test_a_cache_whose_first_layer_holds_no_keys_continues():
    """MiniMax: linear attention first, so that the library asks for masks from position zero on."""
    kinds = {"layer_types": ["linear_attention", "full_attention"], "block_size": 4, "num_experts_per_tok": 1}
    settings = {**GROUPED, **kinds, "num_local_experts": 2}
    minimax = family("minimax", "MiniMaxForCausalLM", "MiniMaxConfig", settings, gain=2.0)
    model, inputs = minimax.build(), minimax.inputs()
    with pytest.warns(UserWarning, match="no call of theirs was seen: model.layers.0"), capture(model) as captured:
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert counts(captured) == {"model.layers.1.self_attn": [14, 14, 14]}


@torch.no_grad()
def test_rejected_tokens_are_refused():
    """Speculative decoding takes back rows that were counted."""
    pytest.importorskip("transformers")
    model, other = BY_NAME["llama"].build(), BY_NAME["llama"].build(seed=1)
    inputs = {name: value[:1] for name, value in BY_NAME["llama"].inputs().items()}
    message = r"layer 'model\.layers\.0\.self_attn' returned from token \d+ to token \d+: tokens were rejected"
    with pytest.raises(NotImplementedError, match=message), capture(model):
        model.generate(**inputs, assistant_model=other, max_new_tokens=8, do_sample=False, pad_token_id=0)


def test_compiled_code_runs_uncompiled_and_is_recorded(tokens):
    def unwanted(graph, inputs):
        raise AssertionError("compiled under capture")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Twice()

        def forward(self, x):
            return self.inner(x)

    outer = Outer()
    compiled = torch.compile(outer, backend=unwanted)
    for model in (compiled, outer, outer.inner):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with capture(model) as captured:
                compiled(tokens)
        assert [stats.num_sequences for stats in captured.layers.values()] == [2, 2]
