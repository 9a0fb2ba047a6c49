"""The layer under the tools of others: encoders of PyTorch, adapters, quantised weights, offloading, other layouts."""

import copy
import io

import numpy as np
import pytest
import torch
from attention.oracles import normal
from priors.cases import off_neutral
from tolerances import assert_close
from torch import nn
from torch.nn import functional

from eotattn.attention import AttentionSinks, GoatAttention, PriorAttention, Rotary
from eotattn.priors import RecencyPrior, goat_prior

B, E, H, Q, K = 2, 24, 4, 5, 7
WIDTHS = {"packed": {}, "apart": {"kdim": 10, "vdim": 13}, "key alone": {"kdim": 10}}


def goat(seed=0):
    return off_neutral(goat_prior(H, num_frequencies=1, num_key_frequencies=2, length_scale=20.0), seed=seed)


def made(**arguments):
    generator = torch.Generator().manual_seed(3)
    layer = PriorAttention(E, H, **{"batch_first": True, "prior": goat(), "dtype": torch.float64, **arguments})
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.startswith("prior"):
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return layer.eval()


def calls(widths):
    """Self-attention where widths allow it, cross-attention to one source and to two."""
    query, key = normal(B, Q, E), normal(B, K, widths.get("kdim", E), seed=1)
    value = normal(B, K, widths.get("vdim", E), seed=2)
    found = [(query, key, value)]
    if not widths:
        found += [(query,), (query, key), (query, query, query.flip(1))]
    return found


# Encoders of PyTorch --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("replaced", ["every layer", "the first", "the last"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_surgery_in_an_encoder_with_padding(grad, batch_first, replaced):
    """In evaluation the encoder looks into the first layer's attention to see whether it can pack the tokens."""
    make = {"dropout": 0.0, "batch_first": batch_first, "dtype": torch.float64}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, **make), 2, enable_nested_tensor=batch_first)
    held = copy.deepcopy(encoder)
    for layer in {"every layer": held.layers, "the first": held.layers[:1], "the last": held.layers[1:]}[replaced]:
        neutral = goat_prior(H, init="neutral")
        layer.self_attn = PriorAttention.from_multihead_attention(layer.self_attn, prior=neutral)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = normal(B, Q, E) if batch_first else normal(B, Q, E).transpose(0, 1)
    expected = encoder.train()(x, src_key_padding_mask=padding)  # its fused path in evaluation is not the oracle
    with torch.set_grad_enabled(grad):
        if replaced == "the last" and batch_first and not grad:
            with pytest.raises(TypeError, match=r"query must be padded; got 'a nested tensor'. .*enable_nested_tensor"):
                held.eval()(x, src_key_padding_mask=padding)
            held.use_nested_tensor = False
        output = held.eval()(x, src_key_padding_mask=padding)
    real = ~padding if batch_first else ~padding.T
    assert_close(output[real], expected[real])


# Adapters and quantised weights ---------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A linear layer with a low-rank term beside it, in whose place it stands: what a LoRA library makes of one."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x, *arguments, **keywords):
        return self.base(x, *arguments, **keywords) + self.up(self.down(x))

    def merged(self):
        layer = copy.deepcopy(self.base)
        with torch.no_grad():
            layer.weight += self.up.weight @ self.down.weight
        return layer


class Int8(torch.Tensor):
    """Whole numbers and a scale a row, which know nothing but the product of a linear layer."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole", "scale"], None

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        if function is functional.linear:
            x, weight, *bias = arguments
            return functional.linear(x, weight.whole.to(x.dtype) * weight.scale, *bias)
        return super().__torch_function__(function, types, arguments, keywords or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.detach.default:
            return Int8(arguments[0].whole, arguments[0].scale)
        raise NotImplementedError(function)


def replace_linears(layer, make):
    """Every linear layer, whatever its name, as tools choose their targets."""
    for name, module in [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]:
        parent = layer.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], make(module))
    return layer


@pytest.mark.parametrize("widths", WIDTHS)
def test_adapters_on_every_linear_layer(widths):
    layer = made(**WIDTHS[widths])
    adapted = replace_linears(copy.deepcopy(layer), Adapted)
    merged = copy.deepcopy(adapted)
    for name in [name for name, module in adapted.named_modules() if isinstance(module, Adapted)]:
        merged.set_submodule(name, adapted.get_submodule(name).merged())
    for inputs in calls(WIDTHS[widths]):
        output = adapted(*inputs)[0]
        assert_close(output, merged(*inputs)[0])
        output.sum().backward()
    assert all(module.up.weight.grad.any() for module in adapted.modules() if isinstance(module, Adapted))
    assert adapted.make_cache(B, Q).keys.dtype == torch.float64


@pytest.mark.parametrize("widths", WIDTHS)
def test_quantised_weights(widths):
    def quantised(linear):
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (linear.weight.detach() / scale).round().to(torch.int8)
        linear.weight = nn.Parameter(Int8(whole, scale), requires_grad=False)
        return linear

    def rounded(linear):
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        linear.weight = nn.Parameter((linear.weight.detach() / scale).round() * scale)
        return linear

    layer = made(**WIDTHS[widths])
    expected, layer = replace_linears(copy.deepcopy(layer), rounded), replace_linears(layer, quantised)
    for inputs in calls(WIDTHS[widths]):
        assert_close(layer(*inputs)[0], expected(*inputs)[0])


def test_hooks_and_parametrisations_of_the_packed_projection_count_in_cross_attention():
    layer, inputs = made(), (normal(B, Q, E), normal(B, K, E, seed=1))
    plain = layer(*inputs)[0]
    handle = layer.in_proj.register_forward_hook(lambda module, arguments, output: 2 * output)
    doubled = copy.deepcopy(layer)
    handle.remove()
    with torch.no_grad():
        for parameter in layer.in_proj.parameters():
            parameter.mul_(2)
    assert_close(doubled(*inputs)[0], layer(*inputs)[0])
    assert (doubled(*inputs)[0] - plain).abs().max() > 1e-2


@pytest.mark.parametrize("targets", ["all-linear", ["in_proj", "out_proj"]])
def test_peft(targets):
    peft = pytest.importorskip("peft")
    layer = made()
    expected = [layer(*inputs)[0] for inputs in calls({})]
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=True)
    model = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    assert isinstance(model.in_proj, peft.tuners.lora.Linear)
    for inputs, before in zip(calls({}), expected, strict=True):
        assert_close(model(*inputs)[0], before)  # an adapter starts at zero


def test_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    layer = made(dtype=torch.float32)
    inputs = [[x.float() for x in call] for call in calls({})]
    expected = [layer(*call)[0] for call in inputs]
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    for call, before in zip(inputs, expected, strict=True):
        # eight bits of each weight: 2^-8 of the largest of a row
        assert_close(layer(*call)[0], before, tolerance=0.05)


# Offloading and devices -----------------------------------------------------------------------------------------------


def test_cpu_offload():
    accelerate = pytest.importorskip("accelerate")
    layer = made(rotary=Rotary(E // H))
    inputs = (normal(B, Q, E), normal(B, K, E, seed=1))
    expected = layer(*inputs)[0]
    line = r"PriorAttention: prior must be on cpu; .*preload_module_classes=\['PriorAttention'\]"
    with pytest.raises(ValueError, match=line):
        accelerate.cpu_offload(copy.deepcopy(layer), execution_device="cpu")(*inputs)
    whole = accelerate.cpu_offload(layer, execution_device="cpu", preload_module_classes=["PriorAttention"])
    assert torch.equal(whole(*inputs)[0], expected)
    with pytest.raises(ValueError, match=r"PriorAttention: device must be where the layer computes; got 'meta'"):
        whole.make_cache(B, Q)
    with pytest.raises(ValueError, match=line):
        whole.make_cache(B, Q, device="cpu")


def test_offloading_of_the_projections_alone_serves_without_a_prior():
    accelerate = pytest.importorskip("accelerate")
    layer, inputs = made(prior=None), (normal(B, Q, E), normal(B, K, E, seed=1))
    expected = layer(*inputs)[0]
    offloaded = accelerate.cpu_offload(layer, execution_device="cpu")
    assert_close(offloaded(*inputs)[0], expected)
    x, arguments = inputs[0], {"is_causal": True, "need_weights": False}
    step = offloaded(x, cache=offloaded.make_cache(B, Q, device="cpu"), **arguments)[0]
    assert_close(step, offloaded(x, **arguments)[0])


def test_the_prior_goes_where_the_layer_is_built():
    prior = goat_prior(H)
    layer = PriorAttention(E, H, prior=prior, batch_first=True, device="meta")
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    with torch.device("meta"):
        theirs = nn.MultiheadAttention(E, H)
    assert PriorAttention.from_multihead_attention(theirs, prior=goat_prior(H)).prior.parts[1].strength.is_meta


# Layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [PriorAttention, GoatAttention])
def test_the_batch_comes_first_unless_said(layer):
    assert layer(64, H).batch_first is True
    line = r"Attention: batch_first must be true or false; got None. .*nn.MultiheadAttention has by default"
    with pytest.raises(TypeError, match=line):
        layer(64, H, batch_first=None)


@pytest.mark.parametrize("batch_first", [True, False])
def test_conversion_carries_the_layout_over(batch_first):
    theirs = nn.MultiheadAttention(E, H, batch_first=batch_first, dtype=torch.float64)
    ours, x = PriorAttention.from_multihead_attention(theirs), normal(3, Q, E)
    assert_close(ours(x)[0], theirs(x, x, x)[0])
    assert ours.batch_first == batch_first


def test_layouts_are_one_another_transposed():
    layer, x = made(prior=RecencyPrior(H)), normal(3, Q, E)
    other = copy.deepcopy(layer)
    other.batch_first = False
    for arguments in ({}, {"is_causal": True}, {"query_positions": torch.tensor([4, 0, 9, 2, 7])}):
        assert_close(other(x.transpose(0, 1), **arguments)[0].transpose(0, 1), layer(x, **arguments)[0])


# What is taken without a fuss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"sinks": AttentionSinks.registers(H, E // H)}, {"rotary": Rotary(E // H)}, {"window": 2}]
)
def test_an_empty_batch(options, need_weights):
    layer, x = made(**options), normal(0, Q, E).requires_grad_()
    output, weights = layer(x, is_causal=True, need_weights=need_weights)
    assert output.shape == (0, Q, E)
    assert weights is None or weights.shape == (0, Q, Q)
    output.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in (layer.in_proj.weight, layer.out_proj.weight))
    padding = torch.zeros(0, Q, dtype=torch.bool)
    assert layer(x, is_causal=True, key_padding_mask=padding, need_weights=need_weights)[0].shape == (0, Q, E)


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.as_tensor])
def test_positions_of_any_kind(kind):
    layer, x = made(rotary=Rotary(E // H)), normal(B, Q, E)
    rows, samples = [4, 0, 9, 2, 7], [[4, 0, 9, 2, 7], [0, 1, 2, 3, 4]]
    for numbers in (rows, samples):
        arguments = {"is_causal": True, "need_weights": False}
        expected = layer(x, query_positions=torch.tensor(numbers), **arguments)[0]
        assert torch.equal(layer(x, query_positions=kind(numbers), **arguments)[0], expected)
    cross = {"query_positions": kind(rows), "key_positions": kind([1, 2, 3])}
    tensors = {name: torch.as_tensor(numbers) for name, numbers in cross.items()}
    assert torch.equal(layer(x, x[:, :3], **cross)[0], layer(x, x[:, :3], **tensors)[0])


@pytest.mark.parametrize("number", [3, np.int64(3)])
def test_a_number_is_the_position_of_the_first_token(number):
    layer, x = made(rotary=Rotary(E // H)), normal(B, Q, E)
    arguments = {"is_causal": True, "need_weights": False}
    expected = layer(x, query_positions=range(3, 3 + Q), **arguments)[0]
    assert torch.equal(layer(x, query_positions=number, **arguments)[0], expected)
    part = layer(x[:, 3:], x, query_positions=3, key_positions=0, **arguments)[0]
    assert_close(part, layer(x, **arguments)[0][:, 3:])


def test_a_layer_with_a_fused_backend_serves_its_default_call():
    layer, x = made(backend="sdpa"), normal(B, Q, E)
    output, weights = layer(x)
    assert weights is None
    assert_close(output, made()(x)[0])
    assert made(backend="reference")(x)[1] is not None
    with pytest.raises(NotImplementedError, match="backend 'sdpa' cannot serve"):
        layer(x, need_weights=True)


# The paper's layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "heads"), [(64, 8), (64, 4), (128, 4), (256, 4), (512, 4)])
def test_goat_fits_its_frequencies_to_the_head(width, heads, dtype):
    if width // heads <= 16 and dtype == torch.bfloat16:
        pytest.skip("one frequency is wider than the head")
    layer = GoatAttention(width, heads, batch_first=True, lane_dtype=dtype)
    frequencies, half = layer.prior.parts[0].even.shape[1], width // heads / 2
    more = GoatAttention(width, heads, num_frequencies=frequencies + 1, batch_first=True, lanes="appended")
    assert layer.content_dim >= half or frequencies == 1
    assert frequencies == 4 or more.prior.num_lanes(dtype) > half
    assert layer(torch.zeros(1, 3, width), is_causal=True)[0].shape == (1, 3, width)


def test_goat_takes_every_argument_of_the_layer():
    other = {"kdim": 10, "vdim": 13, "dropout": 0.1, "window": 4, "sinks": AttentionSinks.zero_key(), "num_kv_heads": 2}
    layer = GoatAttention(64, H, dtype=torch.bfloat16, rotary=Rotary(16, rotary_width=8), **WIDE, **other)
    assert layer.in_proj.key.weight.dtype == torch.bfloat16
    assert (layer.kdim, layer.vdim, layer.window, layer.lanes, layer.content_dim) == (10, 13, 4, "appended", 16)
    assert GoatAttention(64, H, device="meta", batch_first=False).out_proj.weight.is_meta
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_kv_head'"):
        GoatAttention(64, H, batch_first=True, num_kv_head=2)


WIDE = {"lanes": "appended", "batch_first": True}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_heads": 0}, ValueError, "GoatAttention: num_heads must be at least 1"),
        ({"embed_dim": 0}, ValueError, "GoatAttention: embed_dim must be at least 1"),
        ({"embed_dim": 65}, ValueError, "GoatAttention: embed_dim must be a multiple"),
        ({"num_frequencies": 0}, ValueError, "GoatAttention: num_frequencies must be at least 1"),
        ({"num_frequencies": 2.0}, TypeError, "GoatAttention: num_frequencies must be an integer"),
        ({"length_scale": 0.0}, ValueError, "GoatAttention: length_scale must be positive"),
        ({"init": "zero"}, ValueError, "GoatAttention: init must be one of"),
        ({"lane_dtype": "bf16"}, TypeError, "GoatAttention: lane_dtype must be a floating dtype"),
    ],
)
def test_goat_errors_name_goat(arguments, error, message):
    with pytest.raises(error, match=message):
        GoatAttention(**{"embed_dim": 64, "num_heads": H, "batch_first": True, **arguments})


def test_a_layer_holds_no_buffer_that_a_loader_could_miss():
    """Built on a meta device and filled parameter by parameter, as loaders do, it is what it was."""
    make = {"rotary": Rotary(E // H), "sinks": AttentionSinks.registers(H, E // H), "prior": None}
    layer, x = made(**make), normal(B, Q, E)
    with torch.device("meta"):
        other = PriorAttention(E, H, batch_first=True, dtype=torch.float64, **{**make, "rotary": Rotary(E // H)})
    assert not list(layer.buffers())
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other.eval()(x)[0], layer(x)[0])
    stored = io.BytesIO()
    torch.save(layer, stored)
    assert stored.tell() < 40_000, "tables are not stored"
    stored.seek(0)
    assert torch.equal(torch.load(stored, weights_only=False)(x)[0], layer(x)[0])
