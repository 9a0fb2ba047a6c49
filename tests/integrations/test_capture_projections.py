"""What output projections compute: adapters, weights that are elsewhere, and projections that are none."""

import pytest
import torch
from families import BY_NAME
from tolerances import assert_close
from torch import nn
from torch.nn import functional

from eotattn.integrations import capture

L, E, H = 9, 12, 3


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, in the shape that adapter libraries give it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = nn.Linear(E, 2, bias=False), nn.Linear(2, E, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.base_layer(x) + 3 * self.up(self.down(self.dropout(x)))


class Attention(nn.Module):
    def __init__(self, project):
        super().__init__()
        self.project = project

    def forward(self, x):
        heads = x.unflatten(-1, (H, -1)).transpose(1, 2)
        output = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return self.project(output.transpose(1, 2).flatten(2))


@pytest.fixture
def tokens():
    return torch.randn(2, L, E, generator=torch.Generator().manual_seed(0))


def drains(tokens, weight):
    """||W_h v_j|| of every head and key, from the definition."""
    value = tokens.double().unflatten(-1, (H, -1))
    by_head = weight.double().unflatten(-1, (H, -1))
    return torch.einsum("ehv,blhv->bhle", by_head, value).norm(dim=-1)


def adapter():
    torch.manual_seed(1)
    return Adapted(nn.Linear(E, E))


@pytest.mark.parametrize("training", [True, False])
def test_drains_are_those_of_the_adapted_projection(tokens, training):
    project = adapter()
    weight = project.base_layer.weight + 3 * project.up.weight @ project.down.weight
    model = Attention(project).train(training)
    torch.manual_seed(2)
    expected = model(tokens)
    torch.manual_seed(2)
    with capture(model) as captured:
        actual = model(tokens)
    assert torch.equal(actual, expected), "no random number is drawn for the watch"
    assert all(module.training == training for module in model.modules())
    (found,) = captured.values.values()
    assert_close(found.drain, drains(tokens, weight).mean(-1), tolerance=1e-5)
    assert_close(found.sink_drain, drains(tokens, weight)[..., 0], tolerance=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, when peft calls it
def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    model, inputs = BY_NAME["llama"].build(), BY_NAME["llama"].inputs()
    config = peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad(), capture(adapted) as captured:
        adapted(**inputs)
    merged = adapted.merge_and_unload()
    with torch.no_grad(), capture(merged) as once:
        merged(**inputs)
    for found, expected in zip(captured.values.values(), once.values.values(), strict=True):
        assert_close(found.drain, expected.drain, tolerance=1e-4)


@pytest.mark.parametrize("project", [nn.Sequential(nn.LayerNorm(E), nn.Linear(E, E)), nn.Dropout(0.0), nn.GELU()])
def test_what_is_not_linear_is_no_projection(tokens, project):
    model = Attention(project)
    with torch.no_grad(), capture(model) as captured:
        model(tokens)
    assert len(captured.layers) == 1
    assert captured.values == {}


def test_two_linear_layers_in_one_module_are_one_projection(tokens):
    project = nn.Sequential(nn.Linear(E, 5), nn.Linear(5, E))
    model = Attention(project)
    with torch.no_grad(), capture(model) as captured:
        model(tokens)
    (found,) = captured.values.values()
    assert_close(found.drain, drains(tokens, project[1].weight @ project[0].weight).mean(-1), tolerance=1e-5)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@torch.no_grad()
def test_weights_that_are_elsewhere_until_a_layer_runs(where, tmp_path):
    pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    model, inputs = BY_NAME["llama"].build(), BY_NAME["llama"].inputs("left")
    expected = model(**inputs).logits
    with capture(model) as whole:
        model(**inputs)
    if where == "cpu":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    else:
        places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "disk"}
        places |= {"model.rotary_emb": "cpu"}
        model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.model.layers[0].self_attn.o_proj.weight.is_meta
    with capture(model) as captured:
        actual = model(**inputs).logits
    assert torch.equal(actual, expected)
    for name, stats in whole.layers.items():
        assert torch.equal(captured.layers[name].column_mass, stats.column_mass)
        assert_close(captured.values[name].drain, whole.values[name].drain, tolerance=1e-5)
    with capture(model, values=False) as without:
        model(**inputs)
    assert without.values == {}
    assert list(without.layers) == list(whole.layers)
