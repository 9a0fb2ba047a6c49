"""Attach on small random models of many families: a neutral prior changes nothing, any other is where it should be."""

import copy
import pickle

import pytest
import torch
from families import BY_NAME, FAMILIES, GROUPED, IMAGE, SIZES, Family
from tolerances import TOLERANCE, assert_close

pytest.importorskip("transformers")

from eotattn import ForgettingPrior, FourierPrior, GridPrior, RecencyPrior, goat_prior
from eotattn.attention import AttentionSinks
from eotattn.integrations import attach, capture, register_attention
from eotattn.integrations.attachment import attention_layers
from eotattn.priors import QueryGainPrior

#: Families that no other test of this package knows.
HELD_OUT = [
    Family("granite", "GraniteForCausalLM", "GraniteConfig", GROUPED),
    Family("olmo2", "Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    Family("cohere", "CohereForCausalLM", "CohereConfig", GROUPED),
    Family("stablelm", "StableLmForCausalLM", "StableLmConfig", GROUPED),
    Family("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config", GROUPED),
    Family("electra", "ElectraModel", "ElectraConfig", {**SIZES, "embedding_size": 16}, "encoder"),
    Family("deit", "DeiTModel", "DeiTConfig", {**IMAGE, "intermediate_size": 48}, "vision"),
]
#: Families whose own fused function lacks what they need: soft caps, explicit sinks.
EAGER = {"gemma2", "gpt-oss"}

#: Families whose experts, or whose own softmax, run in no more than float32.
SINGLE = {"qwen3-moe", "mixtral", "deepseek-v3", "gpt-oss", "gemma2"}
#: Families whose float32 is looked at as well, which rounds as the kernels do.
ROUNDED = {"llama", "mistral", "gpt2", "bert", "vit", "t5"}
CASES = [
    pytest.param(family, padding, dtype, id=f"{family.name}-{padding or 'full'}-{dtype}")
    for family in [*FAMILIES, *HELD_OUT]
    for padding in ((None,) if family.kind == "vision" else (None, "left", "right"))
    for dtype in (torch.float64, torch.float32)
    if (dtype == torch.float32) == (family.name in SINGLE) or family.name in ROUNDED
]
GENERATING = [
    "llama",
    "gpt-oss",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt-neox",
    "opt",
    "qwen3",
    "deepseek-v3",
    "t5",
]
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
}


def neutral(num_heads):
    return goat_prior(num_heads, num_frequencies=2, init="neutral")


def build(family, **options):
    return family.build("eager" if family.name in EAGER else "sdpa", **options)


def result(output):
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def real_rows(output, inputs):
    """Rows of tokens that are not padding; what a model computes of padding is its own affair."""
    mask = inputs.get("attention_mask")
    return output[mask.bool()] if mask is not None and mask.shape == output.shape[:2] else output


@pytest.mark.parametrize(("family", "padding", "dtype"), CASES)
@torch.no_grad()
def test_a_neutral_prior_changes_nothing(family, padding, dtype):
    model, inputs = build(family, dtype=dtype), family.inputs(padding)
    if family.kind == "vision":
        inputs = {name: value.to(dtype) for name, value in inputs.items()}
    expected = real_rows(result(model(**inputs)), inputs)
    with attach(model, neutral) as attached:
        actual = real_rows(result(model(**inputs)), inputs)
        count = len(attached.priors)
    assert count == len(attention_layers(model)) > 0
    assert_close(actual / expected.abs().amax(), expected / expected.abs().amax(), tolerance=TOLERANCE[dtype])
    with attach(model):
        alone = real_rows(result(model(**inputs)), inputs)
    assert_close(alone / expected.abs().amax(), expected / expected.abs().amax(), tolerance=TOLERANCE[dtype])
    with attach(model, lambda heads: FourierPrior(heads, 2, 3.0, 9.0)) as attached:
        for parameter in attached.parameters():
            parameter.fill_(1.0)
        changed = real_rows(result(model(**inputs)), inputs)
    assert (changed - expected).abs().max() > 1e-2 * expected.abs().max(), "the prior reached the model"
    assert torch.equal(real_rows(result(model(**inputs)), inputs), expected), "and left it again"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", GENERATING)
@torch.no_grad()
def test_generation_is_token_for_token(name, padding, way):
    family = BY_NAME[name]
    model, inputs = build(family), family.inputs(padding)
    inputs.pop("decoder_input_ids", None)

    def generate():
        torch.manual_seed(0)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | WAYS[way]
        return model.generate(**inputs, **options)

    expected = generate()
    with attach(model, neutral):
        actual = generate()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("way", ["greedy", "static"])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", GENERATING[:-1])
@torch.no_grad()
def test_a_prior_reads_the_same_positions_with_and_without_a_cache(name, padding, way):
    family = BY_NAME[name]
    dtype, bound = (torch.float32, 1e-5) if name in SINGLE else (torch.float64, 1e-10)
    model, inputs = build(family, dtype=dtype), family.inputs(padding)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with attach(model, recent):
        cached = model.generate(**inputs, **options, **WAYS[way])
        whole = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    logits = [torch.stack(run.logits) for run in (cached, whole)]
    assert_close(logits[0] / logits[1].abs().amax(), logits[1] / logits[1].abs().amax(), tolerance=bound)


def recent(num_heads):
    return goat_prior(num_heads, num_frequencies=2, length_scale=8.0)


def with_first_token(num_heads):
    """A prior of lags and of keys, in which every head differs."""
    prior = recent(num_heads)
    with torch.no_grad():
        prior.parts[2].first_token.copy_(torch.linspace(-1.0, 2.0, num_heads))
    return prior


def with_bias(family, inputs, padding, prior, implementation):
    """The model's own attention in float64, to which the prior is handed in the mask: the oracle."""
    model = family.build(implementation, dtype=torch.float64)
    length = inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].bool()
    at = torch.arange(length) - (real.int().argmax(-1)[:, None] if padding == "left" else 0)
    lag = at.unsqueeze(-1) - at.unsqueeze(-2)
    seen = ((lag >= 0) & real[:, None])[:, None] if lag.dim() == 3 else ((lag >= 0)[None] & real[:, None])[:, None]
    bias = prior.dense(at, at, dtype=torch.float64)
    bias = bias if bias.dim() == 4 else bias[None]
    mask = torch.where(seen, bias, -1e30)
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return model(
        inputs["input_ids"], attention_mask=mask, position_ids=places, output_attentions=implementation == "eager"
    )


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@torch.no_grad()
def test_the_prior_is_added_where_the_formula_says(name, padding):
    family = BY_NAME[name]
    inputs, prior = family.inputs(padding), with_first_token(4)
    expected = real_rows(with_bias(family, inputs, padding, prior, "sdpa").logits, inputs)
    model = family.build("sdpa", dtype=torch.float64)
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with attach(model, prior), capture(model) as captured:
        actual = result(model(**inputs, position_ids=places))
    assert_close(real_rows(actual, inputs) / expected.abs().amax(), expected / expected.abs().amax(), tolerance=1e-11)
    attentions = with_bias(family, inputs, padding, prior, "eager").attentions  # softmax in float32
    for layer, maps in zip(captured.layers.values(), attentions, strict=True):
        maps = maps.double()
        entropy = -torch.special.xlogy(maps, maps).sum(-1)
        rows = inputs["attention_mask"].bool()[:, None].expand_as(entropy)
        assert_close(layer.sums["entropy"], torch.where(rows, entropy, 0.0).sum(-1), tolerance=1e-5)


@torch.no_grad()
def test_some_heads_of_some_layers():
    family = BY_NAME["llama"]
    inputs, model = family.inputs(), family.build("sdpa", dtype=torch.float64)
    few = RecencyPrior(2)
    whole = few.heads([0, 1, 0, 0]) * (0.0, 1.0, 1.0, 0.0)
    with torch.no_grad():
        few.strength.copy_(torch.tensor([3.0, 0.5]))
    with attach(model, few.heads([1, 0]), layers=[1], heads=[1, 2]) as attached:
        actual = result(model(**inputs))
        assert attached.heads == {"model.layers.1.self_attn": (1, 2)}
    with attach(model, {"model.layers.1.self_attn": few.heads([0, 1, 0, 0]) * (0.0, 1.0, 1.0, 0.0)}):
        assert_close(result(model(**inputs)), actual)
    with attach(model, whole):
        assert (result(model(**inputs)) - actual).abs().max() > 1e-3


@torch.no_grad()
def test_models_are_loaded_with_the_name_and_given_a_prior_later(tmp_path):
    model = BY_NAME["llama"].build("sdpa")
    inputs, expected = BY_NAME["llama"].inputs(), result(model(**BY_NAME["llama"].inputs()))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=register_attention()).eval()
    assert_close(result(loaded(**inputs)), expected)
    attached = attach(loaded, RecencyPrior)
    assert (result(loaded(**inputs)) - expected).abs().max() > 1e-3
    attached.detach()
    assert_close(result(loaded(**inputs)), expected)
    assert loaded.config._attn_implementation == "eotattn"


@torch.no_grad()
def test_copies_pickles_and_state_dicts_carry_the_priors():
    family = BY_NAME["gpt2"]
    model, inputs = family.build("sdpa"), family.inputs("left")
    with attach(model, RecencyPrior):
        expected = result(model(**inputs))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(result(other(**inputs)), expected)
        assert sum("eotattn" in name for name in model.state_dict()) == 2
    assert not [name for name in model.state_dict() if "eotattn" in name]


@torch.no_grad()
def test_weights_are_returned_where_a_model_asks_its_function_for_them():
    family = BY_NAME["llama"]
    model, inputs = family.build("sdpa", dtype=torch.float64), family.inputs()
    seen = []
    layer = model.model.layers[0].self_attn
    with attach(model, RecencyPrior):
        layer.register_forward_pre_hook(lambda m, a, k: (a, {**k, "output_attentions": True}), with_kwargs=True)
        layer.register_forward_hook(lambda m, a, output: seen.append(output[1]))
        model(**inputs)
    expected = with_bias(family, inputs, None, RecencyPrior(4), "eager").attentions[0]  # softmax in float32
    assert_close(seen[0], expected, tolerance=1e-5)


@torch.no_grad()
def test_sinks_are_attached_and_join_those_of_the_model():
    family = BY_NAME["gpt-oss"]
    model, inputs = build(family), family.inputs("left")
    own = [layer.self_attn.sinks for layer in model.model.layers]
    expected = real_rows(result(model(**inputs)), inputs)
    logits = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    with attach(model, sinks=lambda heads: AttentionSinks(logits=torch.full((heads,), -40.0))):
        assert_close(real_rows(result(model(**inputs)), inputs), expected)
    with attach(model, sinks=logits) as attached:
        actual = real_rows(result(model(**inputs)), inputs)
        assert len(attached.sinks) == 2
    for sinks in own:
        sinks.copy_(torch.logaddexp(sinks, logits))
    assert_close(actual, real_rows(result(model(**inputs)), inputs))
    assert (actual - expected).abs().max() > 1e-3
    with (
        attach(model, sinks=AttentionSinks.zero_key()),
        pytest.raises(NotImplementedError, match="sinks must be logits"),
    ):
        model(**inputs)


@torch.no_grad()
def test_capture_sees_the_sinks_of_an_attached_model():
    model, inputs = build(BY_NAME["gpt-oss"]), BY_NAME["gpt-oss"].inputs()
    with capture(model) as plain:
        model(**inputs)
    with attach(model), capture(model) as attached:
        model(**inputs)
    assert list(plain.layers) == list(attached.layers)
    for one, other in zip(plain.layers.values(), attached.layers.values(), strict=True):
        for name in ("explicit_sink_mass", "entropy"):
            assert_close(other.sums[name], one.sums[name], tolerance=1e-4)
        assert_close(other.lag_mass, one.lag_mass, tolerance=1e-4)


def test_cross_attention_and_unknown_keywords_are_told():
    model = BY_NAME["llama"].build()
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "indices": torch.zeros(1)}), with_kwargs=True
    )
    with attach(model, RecencyPrior), pytest.raises(NotImplementedError, match="attach: LlamaAttention passes indices"):
        model(**BY_NAME["llama"].inputs())
    assert model.config._attn_implementation == "eager"
    model = BY_NAME["bart"].build()
    assert not [name for name in attention_layers(model) if "encoder_attn" in name]


def test_models_that_compute_softmax_by_hand_are_refused():
    import transformers

    config = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)
    model = transformers.BloomForCausalLM(config)
    with pytest.raises(NotImplementedError, match="attach: BloomForCausalLM has attention that does not go through"):
        attach(model, RecencyPrior)
    assert model.config._attn_implementation != "eotattn"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": RecencyPrior(3)}, "attach: prior must have 4 heads for model.layers.0.self_attn; got 3"),
        ({"prior": RecencyPrior(4), "heads": [0]}, "attach: prior must have 1 heads"),
        ({"prior": ForgettingPrior(32, 4)}, "attach: prior must read positions alone; got 'ForgettingPrior'"),
        (
            {"prior": RecencyPrior, "heads": [7]},
            "attach: heads must name heads from 0 to 3 of model.layers.0.self_attn",
        ),
        ({"prior": RecencyPrior, "layers": [2]}, "attach: layers must be among {0: model.layers.0.self_attn, 1: "),
        ({"prior": RecencyPrior, "layers": []}, "attach: layers must be among"),
        ({"prior": RecencyPrior, "layers": [0, 0]}, "attach: layers must name each layer once"),
        ({"prior": RecencyPrior, "layers": "model"}, "attach: layers must be a list"),
        ({"prior": {"nowhere": RecencyPrior(4)}}, "attach: prior must be among"),
        ({"prior": 3.0}, "attach: prior must be a LogPrior"),
        ({"prior": GridPrior(RecencyPrior(4), RecencyPrior(4))}, "attach: prior must lie on a sequence"),
        ({"layers": [0]}, "attach: layers must come with a prior or sinks"),
        ({"heads": [0]}, "attach: heads must come with a prior"),
        ({"sinks": torch.zeros(3)}, "attach: sinks must have 4 logits for model.layers.0.self_attn"),
        ({"sinks": "first token"}, "attach: sinks must be AttentionSinks"),
        ({"prior": QueryGainPrior(RecencyPrior(4), 8)}, "attach: prior must read positions alone"),
        ({"prior": lambda heads: ForgettingPrior(8, heads)}, "attach: prior must read positions alone"),
        ({"positional": True}, "attach: positional must come with a prior"),
        (
            {"prior": {"model.layers.0.self_attn": RecencyPrior(4)}, "layers": [0]},
            "attach: layers must be left out where prior names them",
        ),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_the_model_alone(options, message):
    model = BY_NAME["llama"].build("sdpa")
    with pytest.raises((ValueError, TypeError)) as error:
        attach(model, **options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert model.config._attn_implementation == "sdpa"
    assert not [name for name in model.state_dict() if "eotattn" in name]


def test_what_is_attached_says_so_in_a_line():
    model = BY_NAME["llama"].build("sdpa")
    with attach(model, RecencyPrior, layers=[1], sinks=torch.zeros(4)) as attached:
        assert repr(attached) == "Attached(LlamaForCausalLM, model.layers.1.self_attn: RecencyPrior and AttentionSinks)"
    with attach(model) as attached:
        assert repr(attached) == "Attached(LlamaForCausalLM)"


def test_a_second_prior_is_refused():
    model = BY_NAME["llama"].build("sdpa")
    with attach(model, RecencyPrior), pytest.raises(ValueError, match="attach: model must have no priors yet"):
        attach(model, RecencyPrior)
    with pytest.raises(TypeError, match="attach: model must be a module"):
        attach("a model", RecencyPrior)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models_compute_the_same():
    family = BY_NAME["llama"]
    model, inputs = family.build("sdpa"), family.inputs("left")
    with attach(model, RecencyPrior):
        expected = result(model(**inputs))
        compiled = torch.compile(model, backend="eager")
        assert_close(result(compiled(**inputs)), expected)
    torch._dynamo.reset()
