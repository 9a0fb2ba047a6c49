"""The ways in which attention priors were seen to fail elsewhere, one test each: none may happen here.

The numbers count the failures of the package ``goat-attention`` 0.1.1 that this library was built to pass.
"""

import copy
import io
import math

import pytest
import torch
from tolerances import assert_close, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from eotattn import FourierPrior, GoatAttention, GridPrior, PriorAttention, RecencyPrior, SinkPrior, goat_prior
from eotattn.attention import AttentionSinks, prior_attention
from eotattn.priors import ScaledPrior

H, D, WIDTH = 4, 8, 32


def randomise(module, seed=0, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator).to(parameter))
    return module


def content(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def goat_layer(**arguments):
    prior = goat_prior(H, form="paper", num_frequencies=2, length_scale=32.0)
    return randomise(PriorAttention(WIDTH, H, prior=prior, **arguments, batch_first=True)).eval()


def run(layer, x, **arguments):
    return layer(x, is_causal=True, need_weights=False, **arguments)[0]


def test_01_low_precision_keeps_the_recency_prior():
    length, prior = 2048, RecencyPrior(H)
    query, key, value = (content(1, H, length, D, seed=seed, dtype=torch.bfloat16) for seed in range(3))

    @torch.no_grad()
    def error(prior):
        exact = prior_attention(
            query.double(), key.double(), value.double(), prior=prior, is_causal=True, backend="reference"
        )
        output = prior_attention(query, key, value, prior=prior, is_causal=True, backend="sdpa")
        deviation = (output.double() - exact)[..., 512:, :]
        return (deviation.norm() / exact[..., 512:, :].norm()).item()

    assert error(prior) <= 1.5 * error(None)


def test_02_float16_lanes_do_not_overflow():
    keys = 131_072
    query, key = content(1, 1, 1, D, dtype=torch.float16), content(1, 1, keys, D, seed=2, dtype=torch.float16)
    output = prior_attention(query, key, key, prior=RecencyPrior(1), query_positions=range(keys - 1, keys))
    assert output.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("parent", [False, True])
def test_03_casts_do_not_crash_and_keep_the_prior(dtype, parent):
    layer = goat_layer()
    before = layer.prior.dense(torch.arange(5), torch.arange(5))
    cast = nn.Sequential(layer).to(dtype)[0] if parent else layer.to(dtype)
    assert run(cast, content(1, 5, WIDTH, dtype=dtype)).dtype == dtype
    assert torch.equal(cast.prior.dense(torch.arange(5), torch.arange(5)), before)
    assert cast.prior.parts[1].strength.dtype == torch.float32


def test_04_training_after_inference_mode():
    layer, x = goat_layer(), content(2, 7, WIDTH)
    with torch.inference_mode():
        expected = run(layer, x)
    output = run(layer.train(), x)
    output.sum().backward()
    assert_close(output, expected)
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_05_both_axes_of_a_grid_have_all_frequencies():
    along = torch.arange(7)
    still = torch.zeros_like(along)
    axes = [randomise(FourierPrior(H, 5, 3.0, 32.0), seed=2) for _ in range(2)]
    prior, origin = GridPrior(*axes), torch.zeros(1, 2, dtype=torch.int64)
    down, right = (prior.dense(origin, torch.stack(cells, dim=-1)) for cells in ((along, still), (still, along)))
    assert_close(down, right)
    assert relative_error(down[..., 1:], down[..., :-1]) > 0.05  # neighbouring cells differ: high frequencies are there


def test_06_causal_attention_honours_unequal_offsets():
    layer, x = goat_layer(), content(1, 9, WIDTH)
    full, weights = layer(x, is_causal=True, average_attn_weights=False)
    offset = {"query_positions": range(5, 9), "key_positions": range(9)}
    part, part_weights = layer(x[:, 5:], x, x, is_causal=True, average_attn_weights=False, **offset)
    assert_close(part, full[:, 5:])
    assert_close(part_weights, weights[:, :, 5:])
    assert_close(layer(x[:, 5:], x, x, is_causal=True, need_weights=False, **offset)[0], part)


def test_07_a_causal_mask_as_a_tensor_keeps_the_recency_prior():
    layer, x = goat_layer(), content(1, 9, WIDTH)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert_close(layer(x, attn_mask=hidden, need_weights=False)[0], run(layer, x))


def test_08_every_parameter_is_used():
    for layer in (goat_layer(), GoatAttention(64, H, num_frequencies=2, batch_first=True)):
        run(layer, content(2, 7, layer.embed_dim)).square().sum().backward()
        unused = [name for name, parameter in layer.named_parameters() if parameter.grad is None]
        assert not unused


def test_09_compiles_as_one_graph_for_all_lengths():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    layer, counter = goat_layer(), CompileCounter()
    compiled = torch.compile(lambda x: run(layer, x), fullgraph=True, backend=counter)
    for length in (5, 7, 12, 17, 24, 33, 47, 64, 99):
        x = content(2, length, WIDTH)
        assert_close(compiled(x), run(layer, x))
    assert counter.frame_count <= 2


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_10_export_and_functional_transforms():
    layer, x = goat_layer(), content(2, 7, WIDTH)

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return run(self.layer, x)

    model = Causal()
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {1: length}}).module()
    longer = content(2, 11, WIDTH)
    assert_close(exported(longer), model(longer))
    parameters = dict(model.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    gradients = torch.func.grad(loss)(parameters, x[0])
    assert set(gradients) == set(parameters)
    losses = torch.func.vmap(loss, in_dims=(None, 0))(parameters, x)
    assert_close(losses, torch.stack([loss(parameters, sample) for sample in x]))


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return result


def test_11_padding_needs_no_square_tensor():
    length, layer = 1024, goat_layer()
    padding = torch.zeros(2, length, dtype=torch.bool)
    padding[0, 900:] = True
    with LargestTensor() as largest:
        run(layer, content(2, length, WIDTH), key_padding_mask=padding)
    assert largest.size < length * length


def test_12_the_future_does_not_change_the_past():
    layer, x = goat_layer(), content(1, 40, WIDTH)
    assert_close(run(layer, x[:, :9]), run(layer, x)[:, :9])


def test_13_the_cache_remembers_padding():
    layer, x = goat_layer(), content(2, 9, WIDTH)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, :3] = True
    positions = ((~padding).long().cumsum(1) - 1).clamp(min=0)
    full = run(layer, x, key_padding_mask=padding, query_positions=positions)
    cache = layer.make_cache(2, 9)
    parts = [run(layer, x[:, :5], key_padding_mask=padding[:, :5], cache=cache)]
    parts += [run(layer, x[:, t : t + 1], cache=cache) for t in range(5, 9)]
    assert_close(torch.cat(parts, dim=1)[~padding], full[~padding])


def test_14_a_cache_holds_one_entry_a_token():
    layer, x = goat_layer(), content(1, 24, WIDTH)
    cache = layer.make_cache(1, 24)
    for t in range(24):
        run(layer, x[:, t : t + 1], cache=cache)
    assert cache.length == cache.keys.shape[2] == 24
    with pytest.raises(ValueError, match="leave room in 24 slots"):
        run(layer, x[:, :1], cache=cache)
    layer = goat_layer(sinks=AttentionSinks.zero_key())
    cache = layer.make_cache(1, 24)
    steps = [run(layer, x[:, t : t + 1], cache=cache) for t in range(24)]
    assert cache.length == 24  # a sink is no token
    assert_close(torch.cat(steps, dim=1), run(layer, x))


def test_15_left_padding_does_not_move_the_first_token():
    layer, x = goat_layer(), content(1, 6, WIDTH)
    padded = torch.cat([content(1, 3, WIDTH, seed=5), x], dim=1)
    padding = torch.tensor([[True] * 3 + [False] * 6])
    positions = ((~padding).long().cumsum(1) - 1).clamp(min=0)
    output = run(layer, padded, key_padding_mask=padding, query_positions=positions)
    assert_close(output[:, 3:], run(layer, x))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_16_rows_without_keys_poison_nothing(backend):
    query, key, value = (content(2, H, 5, D, seed=seed).requires_grad_() for seed in range(3))
    padding = torch.tensor([[True] * 5, [False] * 5])
    output = prior_attention(query, key, value, prior=RecencyPrior(H), key_padding_mask=padding, backend=backend)
    assert torch.equal(output[0], torch.zeros_like(output[0]))
    for gradient in torch.autograd.grad(output.square().sum(), (query, key, value)):
        assert gradient.isfinite().all()
        assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
    _, weights = prior_attention(query, key, value, key_padding_mask=padding, return_weights=True)
    assert torch.equal(weights[0], torch.zeros_like(weights[0]))


def test_17_masks_are_read_as_documented():
    query, key, value = (content(1, H, 5, D, seed=seed) for seed in range(3))
    keep = content(5, 5, seed=7) > 0
    keep[:, 0] = True
    _, weights = prior_attention(query, key, value, attn_mask=keep, return_weights=True)
    assert torch.equal(weights > 0, keep.expand_as(weights))
    with pytest.raises(TypeError, match=r"attn_mask .* must have a floating dtype"):
        prior_attention(query, key, value, attn_mask=keep.long())
    padding = torch.tensor([[False, False, True, False, False]])
    _, both = prior_attention(query, key, value, attn_mask=keep, key_padding_mask=padding, return_weights=True)
    assert torch.equal(both > 0, (keep & ~padding).expand_as(both))
    bias = torch.zeros(5, 5).index_fill(1, torch.tensor([3]), 200.0)
    _, biased = prior_attention(query, key, value, attn_mask=bias, return_weights=True)
    assert_close(biased[..., 3], torch.ones(1, H, 5))


def test_18_called_like_multihead_attention():
    theirs = nn.MultiheadAttention(WIDTH, H, batch_first=True)
    ours = PriorAttention.from_multihead_attention(theirs)
    query, key = content(2, 5, WIDTH), content(2, 7, WIDTH, seed=2)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    hidden = torch.zeros(5, 7, dtype=torch.bool)
    hidden[:, 1] = True
    positional = (query, key, key, padding, True, hidden, False)
    for actual, expected in zip(ours(*positional), theirs(*positional), strict=True):
        assert_close(actual, expected)
    with pytest.raises(TypeError, match="unexpected keyword"):
        ours(query, key_padding_masks=padding)


def test_19_strided_views_are_not_mistaken_for_self_attention():
    layer = goat_layer()
    x = content(2, 7, 2 * WIDTH)
    query, key = x[..., :WIDTH], x[..., :WIDTH].flip(1)[:, :4]
    view = x.as_strided((2, 7, WIDTH), x.stride())
    expected = layer(query.clone(), key.clone(), key.clone(), need_weights=False)[0]
    assert_close(layer(query, key, key, need_weights=False)[0], expected)
    other = x.as_strided((2, 4, WIDTH), (x.stride(0), x.stride(1) // 2, 1))
    expected = layer(view.clone(), other.clone(), other.clone(), need_weights=False)[0]
    assert_close(layer(view, other, other, need_weights=False)[0], expected)


@pytest.mark.parametrize("widths", [{}, {"kdim": 12, "vdim": 20}])
def test_20_conversion_is_equivalent_at_a_neutral_prior(widths):
    theirs = randomise(nn.MultiheadAttention(WIDTH, H, batch_first=True, **widths))
    ours = PriorAttention.from_multihead_attention(theirs, prior=goat_prior(H, init="neutral"))
    query = content(2, 5, WIDTH)
    key, value = (content(2, 7, widths.get(name, WIDTH), seed=3) for name in ("kdim", "vdim"))
    for actual, expected in zip(ours(query, key, value), theirs(query, key, value), strict=True):
        assert_close(actual, expected)


def test_21_reserved_lanes_leave_no_dead_projection_row():
    layer = randomise(GoatAttention(64, H, num_frequencies=2, batch_first=True))
    run(layer, content(2, 9, 64)).square().sum().backward()
    assert (layer.in_proj.weight.grad.abs().sum(dim=1) > 0).all()
    assert layer.in_proj.weight.shape[0] == H * (2 * layer.content_dim + layer.head_dim)


def test_22_frequencies_survive_casts_and_loading():
    layer, x = goat_layer(), content(1, 9, WIDTH)
    expected = run(layer, x)
    restored = goat_layer(dtype=torch.bfloat16).float()
    run(restored, x)
    restored.load_state_dict(layer.state_dict())
    assert_close(run(restored, x), expected)
    assert restored.prior.parts[0].frequencies == layer.prior.parts[0].frequencies
    assert_close(run(layer.double().float(), x), expected)


def test_22_a_16_bit_checkpoint_does_not_bend_the_frequencies():
    layer, x = goat_layer(), content(1, 9, WIDTH)
    rounded = {name: tensor.to(torch.bfloat16).to(tensor.dtype) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in layer.state_dict().items()})
    assert layer.prior.parts[0].frequencies == goat_layer().prior.parts[0].frequencies
    other = goat_layer()
    other.load_state_dict(rounded)
    assert torch.equal(run(other, x), run(layer, x))


def test_23_a_scale_is_saved_and_scales_everything():
    prior = randomise(goat_prior(H, num_frequencies=2))
    positions = torch.arange(9)
    scaled = ScaledPrior(prior, 0.25, learnable=True)  # a fixed scale belongs to the constructor
    assert_close(scaled.dense(positions, positions), 0.25 * prior.dense(positions, positions))
    assert_close((0.25 * prior).dense(positions, positions), 0.25 * prior.dense(positions, positions))
    other = ScaledPrior(goat_prior(H, num_frequencies=2), 1.0, learnable=True)
    other.load_state_dict(scaled.state_dict())
    assert_close(other.dense(positions, positions), scaled.dense(positions, positions))
    with torch.device("meta"):
        layer = PriorAttention(WIDTH, H, prior=0.5 * goat_prior(H, num_frequencies=2), batch_first=True)
    layer.to_empty(device="cpu").reset_parameters()
    fresh = 0.5 * goat_prior(H, num_frequencies=2)
    assert torch.equal(layer.prior.dense(positions, positions), fresh.dense(positions, positions))


def test_24_every_head_has_its_own_parts_and_a_neutral_start_can_learn():
    prior = goat_prior(H, form="paper", num_frequencies=2, max_period=16.0, length_scale=16.0, init="neutral")
    assert [type(part) for part in prior.parts] == [FourierPrior, RecencyPrior, SinkPrior]
    assert all(parameter.shape[0] == H for parameter in prior.parameters())
    layer = PriorAttention(WIDTH, H, prior=prior, batch_first=True)
    run(layer, content(2, 9, WIDTH)).square().sum().backward()
    for name, parameter in prior.named_parameters():
        assert (parameter.grad.abs() > 1e-6).all(), name


def test_25_the_log_prior_of_every_head_can_be_read():
    prior = randomise(goat_prior(H))
    dense = prior.dense(torch.arange(5), torch.arange(7))
    assert dense.shape == (H, 5, 7)
    assert relative_error(dense[0], dense[1]) > 0.1


def test_copies_and_pickles():
    layer, x = goat_layer(), content(1, 9, WIDTH)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(run(twin, x), run(layer, x))
    assert math.isfinite(run(layer, x).sum().item())
