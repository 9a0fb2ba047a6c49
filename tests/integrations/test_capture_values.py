"""Values and certificates under capture: of every family, of PyTorch's layers, of the package's own."""

import pytest
import torch
from families import BY_NAME, FAMILIES
from tolerances import assert_close
from torch import nn

from eotattn import PriorAttention, RecencyPrior, grid_positions
from eotattn.diagnostics import fit_grid_prior
from eotattn.diagnostics.value_statistics import value_drain
from eotattn.integrations import capture

L, E, H = 9, 12, 3


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_every_family_shows_its_output_projection_and_its_certificate(family):
    pytest.importorskip("transformers")
    model = family.build()
    with capture(model, certify=True) as captured:
        model(**family.inputs(None if family.kind == "vision" else "left"))
    assert list(captured.values) == list(captured.layers)
    for name, values in captured.values.items():
        assert values.drain.shape == captured.layers[name].sums["entropy"].shape
        assert torch.isfinite(values.drain).all()
        assert torch.isfinite(values.sink_drain).all()
        assert (values.stable_rank >= 1 - 1e-6).all()
        gaps = captured.certificates[name]
        assert gaps.shape == values.drain.shape
        assert gaps.min() > -1e-12
        assert gaps.max() < 1e-6  # float32 weights of these models


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_models_drains_are_those_of_its_weights(implementation):
    pytest.importorskip("transformers")
    llama = next(family for family in FAMILIES if family.name == "llama")
    model, inputs = llama.build(implementation), llama.inputs()
    seen = {}
    layer = model.model.layers[1].self_attn
    layer.v_proj.register_forward_hook(lambda module, args, output: seen.update(value=output))
    layer.o_proj.register_forward_pre_hook(lambda module, args: seen.update(output=args[0]))
    with capture(model) as captured:
        model(**inputs)
    value = seen["value"].unflatten(-1, (2, 8)).transpose(1, 2)
    drains = value_drain(value, layer.o_proj.weight)
    found = captured.values["model.layers.1.self_attn"]
    assert_close(found.drain, drains.double().mean(-1), tolerance=1e-5)
    assert_close(found.sink_drain, drains.double()[..., 0], tolerance=1e-5)
    by_head = layer.o_proj.weight.unflatten(-1, (4, 8)).movedim(1, 0)
    written = seen["output"].unflatten(-1, (4, 8)).transpose(1, 2) @ by_head.mT
    assert_close(found.contribution, written.norm(dim=-1).mean(-1).double(), tolerance=1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
def test_layers_of_torch_and_of_the_package(need_weights):
    torch.manual_seed(0)
    tokens = torch.randn(2, L, E, dtype=torch.float64)
    layers = {
        "torch": nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64).eval(),
        "package": PriorAttention(E, H, prior=RecencyPrior(H), batch_first=True, dtype=torch.float64).eval(),
    }
    for name, layer in layers.items():
        arguments = (tokens, tokens, tokens) if name == "torch" else (tokens,)
        with capture(layer, certify=True) as captured:
            layer(*arguments, need_weights=need_weights)
        ((layer_name, found),) = captured.values.items()
        assert found.drain.min() > 0
        assert captured.certificates[layer_name].abs().max() < 1e-12


def test_wrong_weights_are_certified_as_wrong():
    """A kernel that keeps 16 bits of every weight has a gap that matches its divergence from the truth."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(E, H, batch_first=True).eval()
    tokens = 3 * torch.randn(2, L, E)
    gaps = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer, inputs = model.to(dtype), tokens.to(dtype)
        with capture(layer, certify=True) as captured:
            layer(inputs, inputs, inputs, need_weights=False)
        (gaps[dtype],) = captured.certificates.values()
    assert gaps[torch.float32].max() < 1e-6
    assert 1e-7 < gaps[torch.bfloat16].max() < 1e-2
    assert gaps[torch.bfloat16].max() > 10 * gaps[torch.float32].max()


class Rotated(nn.Module):
    """Attention whose heads pass through something else before they are projected."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(E, E)

    def forward(self, x):
        heads = x.unflatten(-1, (H, -1)).transpose(1, 2)
        output = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return self.project(output.transpose(1, 2).flatten(2).roll(1, -1))


def test_a_projection_that_reads_something_else_is_left_out():
    model = Rotated()
    with capture(model) as captured:
        model(torch.randn(1, L, E))
    assert len(captured.layers) == 1
    assert captured.values == {}


def test_heads_are_selected_and_the_outputs_stay():
    torch.manual_seed(0)
    model, tokens = nn.MultiheadAttention(E, H, batch_first=True).eval(), torch.randn(2, L, E)
    expected, _ = model(tokens, tokens, tokens, need_weights=False)
    with capture(model, certify=True) as everything:
        actual, _ = model(tokens, tokens, tokens, need_weights=False)
    assert torch.equal(actual, expected)
    with capture(model, heads=[2], certify=True) as captured:
        model(tokens, tokens, tokens, need_weights=False)
    (name,) = captured.values
    assert torch.equal(captured.values[name].drain, everything.values[name].drain[:, [2]])
    assert torch.equal(captured.certificates[name], everything.certificates[name][:, [2]])


@pytest.mark.parametrize("name", ["vit", "dinov2"])
@torch.no_grad()
def test_vision_models_show_lags_in_two_axes(name):
    pytest.importorskip("transformers")
    model, inputs = BY_NAME[name].build(), BY_NAME[name].inputs()
    maps = model(**inputs, output_attentions=True).attentions
    with capture(model, grid=(3, 3)) as captured:
        model(**inputs)
    cells = grid_positions(3, 3, class_token=True).tolist()
    for found, p in zip(captured.grids.values(), maps, strict=True):
        mass = torch.zeros(3, 4, 5, 5, dtype=torch.float64)
        for i, (r, c) in enumerate(cells):
            for j, (s, d) in enumerate(cells):
                if min(r, s) >= 0:
                    mass[..., r - s + 2, c - d + 2] += p[..., i, j]
        assert_close(found.lag_mass, mass, tolerance=1e-5)
        report = fit_grid_prior(found)
        assert report.explained_in_sample.min() > 0
        assert report.has_class_token
    message = r"GridStatistics: attention must be square with 2 x 3 tokens, or one more"
    with pytest.raises(ValueError, match=message), capture(model, grid=(2, 3)):
        model(**inputs)


@torch.no_grad()
def test_grids_refuse_explicit_sinks():
    pytest.importorskip("transformers")
    model, inputs = BY_NAME["gpt-oss"].build(), BY_NAME["gpt-oss"].inputs()
    with pytest.raises(ValueError, match=r"capture: grid must meet no explicit sink"), capture(model, grid=(3, 3)):
        model(**inputs)
