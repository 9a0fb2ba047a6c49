"""Two processes give what one gives: data parallel, fully sharded, and a sequence shared between them (gloo, CPU)."""

import pytest
import torch
import torch.distributed as dist
from processes import Gather, reports, run_together
from tolerances import assert_close
from torch import nn

from eotattn import PriorAttention, goat_prior, prior_attention

WORLD, LENGTH, WIDTH, H = 2, 14, 32, 4


def make_layer():
    generator = torch.Generator().manual_seed(0)
    layer = PriorAttention(
        WIDTH, H, num_kv_heads=2, prior=goat_prior(H, num_frequencies=2, length_scale=16.0), batch_first=True
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def make_input(batch):
    return torch.randn(batch, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def loss_of(layer, x):
    return layer(x, is_causal=True, need_weights=False)[0].square().mean()


def gradients_alone(batch):
    layer = make_layer()
    loss_of(layer, make_input(batch)).backward()
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


def data_parallel(rank):
    model = nn.parallel.DistributedDataParallel(make_layer())
    for _ in range(2):  # a second step fails if the first left a parameter unused
        model.zero_grad()
        model(make_input(WORLD)[rank : rank + 1], is_causal=True, need_weights=False)[0].square().mean().backward()
    expected = gradients_alone(WORLD)
    for name, parameter in model.module.named_parameters():
        assert_close(parameter.grad, expected[name])


def fully_sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layer, mesh = make_layer(), init_device_mesh("cpu", (WORLD,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(layer.prior, mesh=mesh)  # its numbers are exact or they are nothing
    fully_shard(layer, mesh=mesh, mp_policy=policy)
    for _ in range(2):
        layer.zero_grad()
        loss_of(layer, make_input(WORLD)[rank : rank + 1]).backward()
    expected = gradients_alone(WORLD)
    cast = fully_shard(make_layer(), mesh=mesh, mp_policy=policy)
    with pytest.raises(TypeError, match=r"PriorAttention: prior must keep its 32-bit .*fully_shard\(layer.prior\)"):
        loss_of(cast, make_input(WORLD)[rank : rank + 1])
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == torch.float32
        gradient = parameter.grad.full_tensor()
        scale = expected[name].abs().max()
        # bfloat16 projections: each gradient sums products of numbers that are off by up to 2^-9
        assert_close(gradient / scale, expected[name] / scale, tolerance=0.05)


def shared_sequence(rank):
    """Each process holds half of the tokens and all keys, gathered; positions are global."""
    layer, x = make_layer(), make_input(2)
    half = LENGTH // WORLD
    mine = range(rank * half, (rank + 1) * half)
    content = layer.project(x[:, mine.start : mine.stop])
    key, value = (torch.cat([*Gather.apply(side)], dim=2) for side in (content.key, content.value))
    heads = prior_attention(
        content.query, key, value, prior=layer.prior, query_positions=mine, is_causal=True, scale=layer.scale
    )
    output = layer.out_proj(heads.transpose(1, 2).flatten(2))
    whole = layer(x, is_causal=True, need_weights=False)[0]
    assert_close(output, whole[:, mine.start : mine.stop])
    (output.square().sum() / whole.numel()).backward()
    expected = gradients_alone(2)
    for name, parameter in layer.named_parameters():
        dist.all_reduce(parameter.grad)
        assert_close(parameter.grad, expected[name])


CASES = (data_parallel, fully_sharded, shared_sequence)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run_together(CASES, WORLD, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_agree_with_one(folder, case):
    for report in reports(case, folder):
        pytest.fail(report)
