"""Capture on small random models of many families: outputs stay, statistics are those of the model's own maps."""

import pytest
import torch
from families import BY_NAME, FAMILIES
from tolerances import assert_close

pytest.importorskip("transformers")

from eotattn.integrations import capture, hugging_face

CASES = [
    pytest.param(family, padding, id=f"{family.name}-{padding or 'full'}")
    for family in FAMILIES
    for padding in ((None,) if family.kind == "vision" else (None, "left", "right"))
]


def result(output):
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.fixture(params=["whole", "blocks"])
def row_blocks(request, monkeypatch):
    """The model's own function called once, and in blocks of two rows."""
    if request.param == "blocks":
        monkeypatch.setattr(hugging_face, "ROW_BLOCK", 2 * 3 * 4 * 11)
    return request.param


@pytest.mark.parametrize(("family", "padding"), CASES)
@torch.no_grad()
def test_outputs_under_capture_equal_eager(family, padding, row_blocks):
    model, inputs = family.build(), family.inputs(padding)
    expected = result(model(**inputs))
    with capture(model) as captured:
        actual = result(model(**inputs))
    if row_blocks == "whole":
        assert torch.equal(actual, expected)
    else:  # products of other sizes round otherwise; float32 through two layers and 1e-6 an operation
        assert_close(actual, expected, tolerance=1e-5)
    assert len(captured.layers) == family.layers
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(("family", "padding"), CASES)
@torch.no_grad()
def test_statistics_are_those_of_the_models_own_maps(family, padding):
    model, inputs = family.build(), family.inputs(padding)
    maps = model(**inputs, output_attentions=True)
    names = ("encoder_attentions", "decoder_attentions", "cross_attentions")
    groups = [maps.get(name) for name in names] if family.kind == "seq2seq" else [maps.attentions]
    with capture(model, sink_positions=(1,)) as captured:
        model(**inputs)
    if family.kind == "seq2seq":  # captured in the order of calls: the decoder alternates self and cross attention
        layers = list(captured.layers.values())
        ordered = [layers[:2], layers[2::2], layers[3::2]]
    else:
        ordered = [list(captured.layers.values())]
    real = inputs.get("attention_mask")
    for kind, (layers, weights) in enumerate(zip(ordered, groups, strict=True)):
        for layer, p in zip(layers, weights, strict=True):
            rows = real.bool() if real is not None and kind == 0 else torch.ones(3, p.shape[2], dtype=torch.bool)
            compare(layer, p.double(), rows, real if kind == 0 else None, family.name)


def compare(layer, p, rows, real, name):
    keep = rows[:, None, :, None]
    assert torch.equal(layer.num_queries, rows.sum(-1).double())
    p = torch.where(keep, p, 0.0)
    start = torch.zeros(3, dtype=torch.int64) if real is None else real.argmax(-1)
    for b in range(3):
        columns = p[b].sum(-2)[:, int(start[b]) :]
        assert_close(layer.column_mass[b, :, : columns.shape[-1]], columns, tolerance=1e-4)
        assert_close(layer.key_mass[b, :, 0], columns[:, 1], tolerance=1e-4)
    if name != "gpt-oss":  # its maps leave the explicit sink out
        entropy = -torch.special.xlogy(p, p).sum((-1, -2))
        assert_close(layer.sums["entropy"], entropy, tolerance=1e-4)
        assert (entropy / rows.sum(-1)[:, None]).std() > 0.01  # not the flat attention of an untrained model


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "modernbert", "vit", "t5"])
@torch.no_grad()
def test_fused_models_give_the_statistics_of_eager_ones(name):
    family = BY_NAME[name]
    inputs = family.inputs(None if family.kind == "vision" else "left")
    layers = []
    for implementation in ("eager", "sdpa"):
        model = family.build(implementation)
        with capture(model) as captured:
            model(**inputs)
        layers.append(captured.layers)
        assert model.config._attn_implementation == implementation
    assert list(layers[0]) == list(layers[1])
    for one, other in zip(layers[0].values(), layers[1].values(), strict=True):
        assert_close(one.sums["entropy"], other.sums["entropy"], tolerance=1e-4)
        assert_close(one.lag_mass, other.lag_mass, tolerance=1e-4)


GENERATING = [
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt-oss",
    "gpt2",
    "gpt-neox",
    "opt",
    "qwen3",
    "deepseek-v3",
    "t5",
]


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", GENERATING)
@torch.no_grad()
def test_cached_generation_is_token_for_token(name, padding):
    family = BY_NAME[name]
    model, inputs = family.build(), family.inputs(padding)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    with capture(model) as captured:
        actual = model.generate(**inputs, **options)
    assert torch.equal(actual, expected)
    for layer in captured.layers.values():
        assert layer.num_sequences == 3, "decoding continues the sequences of the prompt"
    if family.kind == "decoder":
        whole = {"input_ids": actual[:, :-1], "attention_mask": torch.ones_like(actual[:, :-1])}
        whole["attention_mask"][:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        if name == "gpt2":  # learned positions, which generation counts from the first real token
            whole["position_ids"] = (whole["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with capture(model) as at_once:
            model(**whole)
        for step, full in zip(captured.layers.values(), at_once.layers.values(), strict=True):
            assert torch.equal(step.num_queries, full.num_queries)
            assert_close(step.sums["entropy"], full.sums["entropy"], tolerance=1e-4)
            width = min(step.column_mass.shape[-1], full.column_mass.shape[-1])
            assert_close(step.column_mass[..., :width], full.column_mass[..., :width], tolerance=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@torch.no_grad()
def test_caches_of_fixed_size_are_read_in_chunks(name, implementation):
    """They keep their length in a tensor that grows between the request for a mask and its use."""
    from transformers import StaticCache

    model = BY_NAME[name].build(implementation)
    tokens = BY_NAME[name].inputs()["input_ids"]

    def run():
        cache = StaticCache(config=model.config, max_cache_len=16)
        parts = [
            model(tokens[:, span], past_key_values=cache).logits for span in (slice(5), slice(5, 10), slice(10, 11))
        ]
        return torch.cat(parts, 1)

    expected = run()
    with capture(model) as captured:
        actual = run()
    assert_close(actual, expected)
    with capture(model) as whole:
        model(tokens)
    for parts, once in zip(captured.layers.values(), whole.layers.values(), strict=True):
        assert torch.equal(parts.num_queries, once.num_queries)
        assert_close(parts.sums["entropy"], once.sums["entropy"], tolerance=1e-4)
        reach = min(parts.max_lag, once.max_lag)
        lags = [x.lag_mass[..., x.max_lag - reach : x.max_lag + reach + 1] for x in (parts, once)]
        assert_close(*lags, tolerance=1e-4)
        assert_close(lags[0].sum(-1), parts.num_queries[:, None].expand(3, 4), tolerance=1e-4)


@torch.no_grad()
def test_explicit_sinks_are_counted():
    model, inputs = BY_NAME["gpt-oss"].build(), BY_NAME["gpt-oss"].inputs()
    sinks = model.model.layers[0].self_attn.sinks
    sinks.copy_(torch.tensor([-2.0, 0.0, 1.0, 3.0]))
    maps = model(**inputs, output_attentions=True).attentions[0].double()
    with capture(model) as captured:
        model(**inputs)
    layer = next(iter(captured.layers.values()))
    assert_close(layer.sums["explicit_sink_mass"], (1 - maps.sum(-1)).sum(-1), tolerance=1e-4)
    assert layer.sums["explicit_sink_mass"].min() > 0


@torch.no_grad()
def test_recomputed_checkpoints_are_recorded_once():
    family = BY_NAME["llama"]
    model, inputs = family.build().train(), family.inputs()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with torch.enable_grad(), capture(model) as captured:
        result(model(**inputs)).square().mean().backward()
    assert [stats.num_sequences for stats in captured.layers.values()] == [3, 3]


@torch.no_grad()
def test_training_goes_through_with_gradients_and_dropout():
    family = BY_NAME["bert"]
    model, inputs = family.build(), family.inputs()
    model.train()
    gradients = []
    for listens in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        with torch.enable_grad():
            if listens:
                with capture(model):
                    result(model(**inputs)).square().mean().backward()
            else:
                result(model(**inputs)).square().mean().backward()
        gradients.append(model.embeddings.word_embeddings.weight.grad.clone())
    assert torch.equal(*gradients)
