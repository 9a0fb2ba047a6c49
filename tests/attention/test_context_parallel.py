"""Four processes that share the tokens of a sequence give what one gives (gloo, CPU)."""

from functools import reduce

import pytest
import torch
import torch.distributed as dist
from processes import Gather, reports, run_together
from tolerances import assert_close
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as OnAxis
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention as engine

from eotattn import PriorAttention, goat_prior, prior_attention
from eotattn.attention import AttentionSinks, PackedDocuments, Rotary, merge
from eotattn.attention.statistics import SequenceStatistics, row_statistics
from eotattn.integrations import capture
from eotattn.priors import FourierPrior, TransposedPrior
from eotattn.transport import Newton, TransportProblem, solve

COUNT, LENGTH, B, H, HK, D = 4, 24, 2, 4, 2, 6


def shard(rank, length=LENGTH):
    """Positions of a process: parts i and 2n - 1 - i of 2n, so that causal work is shared evenly, or else part i."""
    parts = torch.arange(length).chunk(2 * COUNT if length % (2 * COUNT) == 0 else COUNT)
    return torch.cat([parts[rank], parts[-1 - rank]]) if len(parts) > COUNT else parts[rank]


def content(dtype):
    generator = torch.Generator().manual_seed(3)
    shapes = ((B, H, LENGTH, D), (B, HK, LENGTH, D), (B, HK, LENGTH, D), (B, HK, LENGTH))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def learned():
    generator = torch.Generator().manual_seed(4)
    prior = goat_prior(H, num_frequencies=2, length_scale=16.0)
    sinks = AttentionSinks(logits=torch.zeros(H), key=torch.zeros(HK, 2, D), value=torch.zeros(HK, 2, D))
    modules = torch.nn.ModuleList([prior, sinks, Rotary(D)])
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return modules


def ring(query, key, value, key_bias, positions, modules, allowed):
    """Attend to the shards of all processes, one after the other; sinks are told to one of the calls alone."""
    prior, sinks, rotary = modules
    query, key = rotary(query, positions), rotary(key, positions)
    gathered = zip(*(Gather.apply(side) for side in (key, value, key_bias, positions)), strict=True)
    parts = [
        prior_attention(
            query, far, values, prior=prior, key_bias=bias, query_positions=positions, key_positions=at,
            is_causal=True, attn_mask=allowed(owner), sinks=sinks if owner == 0 else None, return_lse=True,
        )
        for owner, (far, values, bias, at) in enumerate(gathered)
    ]  # fmt: skip
    return merge(*zip(*parts, strict=True))


def check_ring(rank, documents, dtype):
    tensors, modules, mine = content(dtype), learned().to(dtype), shard(rank)
    positions = torch.arange(LENGTH)
    allowed = lambda owner: None  # noqa: E731
    if documents is not None:
        positions = documents.positions(B, LENGTH, torch.device("cpu"))
        ids = documents.ids(B, LENGTH, torch.device("cpu"))
        allowed = lambda owner: (ids[:, mine, None] == ids[:, None, shard(owner)]).unsqueeze(1)  # noqa: E731
    query, key, value, bias = tensors
    options = {"prior": modules[0], "key_bias": bias, "sinks": modules[1], "documents": documents}
    turned = (modules[2](side, positions) for side in (query, key))
    whole = prior_attention(*turned, value, is_causal=True, return_lse=True, **options)
    weights = torch.randn(B, H, LENGTH, D, generator=torch.Generator().manual_seed(5), dtype=dtype)
    ((whole[0] * weights).sum() + whole[1].square().sum()).backward()
    expected = [tensor.grad for tensor in (*tensors, *modules.parameters())]

    modules = learned().to(dtype)
    mine_alone = [tensor.detach()[:, :, mine].requires_grad_() for tensor in tensors]
    output, lse = ring(*mine_alone, positions[..., mine], modules, allowed)
    assert_close(output, whole[0][:, :, mine])
    assert_close(lse, whole[1][:, :, mine])
    ((output * weights[:, :, mine]).sum() + lse.square().sum()).backward()
    for tensor, gradient in zip(mine_alone, expected, strict=False):
        assert_close(tensor.grad, gradient[:, :, mine])
    for parameter, gradient in zip(modules.parameters(), expected[len(tensors) :], strict=True):
        dist.all_reduce(parameter.grad)
        assert_close(parameter.grad, gradient)


def merged_double(rank):
    check_ring(rank, None, torch.float64)


def merged_single(rank):
    check_ring(rank, None, torch.float32)


def merged_documents(rank):
    check_ring(rank, PackedDocuments([10, 14, 24]), torch.float64)


def give_engine_cpu_kernels():
    """PyTorch's ring knows the kernels of GPUs alone: the same ring with the kernel of a CPU in their place."""
    operators = torch.ops.aten
    forward = operators._scaled_dot_product_flash_attention_for_cpu
    backward = operators._scaled_dot_product_flash_attention_for_cpu_backward

    def on_shards(function):
        def handler(operator, args, kwargs):
            mesh = args[0].device_mesh
            local = [arg.to_local() if isinstance(arg, DTensor) else arg for arg in args]
            results = function(mesh.get_group(), 2, *local, **kwargs)
            return tuple(DTensor.from_local(result, mesh, [OnAxis(2)], run_check=False) for result in results)

        return handler

    def attend(group, axis, query, key, value, dropout_p=0.0, is_causal=False, **options):
        return engine._templated_ring_attention(group, axis, forward, query, key, value, is_causal, **options)

    def gradients(group, axis, grad, query, key, value, output, lse, dropout_p, is_causal, **options):
        operands, options = (query, key, value, output, lse), {"dropout_p": dropout_p, **options}
        ring = engine._templated_ring_attention_backward
        return ring(group, axis, backward, grad, "grad_out", *operands, is_causal, **options)

    engine.custom_ops[forward.default] = on_shards(attend)
    engine.custom_ops[backward.default] = on_shards(gradients)


def make_layer(num_kv_heads):
    layer = PriorAttention(
        32, H, num_kv_heads=num_kv_heads, rotary=Rotary(8), batch_first=True,
        prior=goat_prior(H, num_frequencies=2, length_scale=16.0),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def check_engine(rank, num_kv_heads, length, *, positions_as_buffer):
    give_engine_cpu_kernels()
    generator = torch.Generator().manual_seed(7)
    x, bias = torch.randn(B, length, 32, generator=generator), torch.randn(B, num_kv_heads, length, generator=generator)
    whole, layer = make_layer(num_kv_heads), make_layer(num_kv_heads)
    expected = whole(x, is_causal=True, need_weights=False, key_bias=bias)[0]
    expected.square().mean().backward()
    mine = shard(rank, length)
    tokens, biases, positions = x.clone(), bias.clone(), torch.arange(length)
    mesh = init_device_mesh("cpu", (COUNT,))
    with context_parallel(mesh, buffers=[tokens, biases, positions], buffer_seq_dims=[1, 2, 0]):
        assert positions.tolist() == mine.tolist()
        at = positions if positions_as_buffer else None
        options = {"is_causal": True, "need_weights": False, "key_bias": biases}
        output = layer(tokens, query_positions=at, **options)[0]
        assert_close(output, expected[:, mine])
        (output.square().sum() / expected.numel()).backward()
        with pytest.raises(ValueError, match="positions must be this process's shard of consecutive ones"):
            layer(tokens, query_positions=mine.flip(0), **options)
    for name, parameter in layer.named_parameters():
        dist.all_reduce(parameter.grad)
        assert_close(parameter.grad, whole.get_parameter(name).grad)
    assert torch.equal(tokens, x)  # and outside, calls are those of one process
    assert_close(layer(x, is_causal=True, need_weights=False, key_bias=bias)[0], expected)


def engine_with_positions_left_out(rank):
    check_engine(rank, H, 48, positions_as_buffer=False)


def engine_with_positions_as_buffer(rank):
    check_engine(rank, H, LENGTH, positions_as_buffer=True)


def engine_with_grouped_queries(rank):
    check_engine(rank, HK, LENGTH, positions_as_buffer=False)


def engine_without_balance(rank):
    check_engine(rank, H, 20, positions_as_buffer=False)


def refused_by_engine(rank):
    query, key, value, _ = (tensor.detach()[:, :, :4] for tensor in content(torch.float32))
    prior, sinks, _ = learned()
    mask = torch.ones(4, 4, dtype=torch.bool)
    refused = (
        ({"sinks": sinks}, "sinks must be left out in context_parallel"),
        ({"return_lse": True}, "return_lse must be left out"),
        ({"attn_mask": mask}, "attn_mask must be left out"),
        ({"window": 2}, "window must be left out"),
        ({"documents": PackedDocuments([4, 4])}, "documents must be left out"),
        ({"key_padding_mask": mask[:2]}, "key_padding_mask must be left out"),
        ({"is_causal": False}, "is_causal must be true in context_parallel"),
        ({"query_positions": [3, 2, 1, 0]}, "query_positions must be this process's shard"),
    )
    with context_parallel(init_device_mesh("cpu", (COUNT,)), buffers=[torch.zeros(16)], buffer_seq_dims=[0]):
        for options, message in refused:
            with pytest.raises(ValueError, match=f"prior_attention: {message}"):
                prior_attention(query, key, value, prior=prior, **{"is_causal": True, **options})
        for backend in ("reference", "near_far", "rebased", "flex", "varlen"):
            with pytest.raises(NotImplementedError, match="context_parallel shares stock calls"):
                prior_attention(query, key, value, prior=prior, is_causal=True, backend=backend)
        with (
            pytest.raises(ValueError, match="capture: model must run outside of context_parallel"),
            capture(layer := make_layer(H)),
        ):
            layer(torch.zeros(B, 4, 32), is_causal=True, need_weights=False)
        with pytest.raises(ValueError, match="key must have the query's 4 tokens"):
            prior_attention(query, key[:, :, :2], value[:, :, :2], prior=prior, is_causal=True)


def heads_of_one_process(rank):
    """Tensor parallel: a process with some heads needs the prior of these."""
    query, key, value, _ = (tensor.detach() for tensor in content(torch.float64))
    prior = learned()[0]
    whole = prior_attention(query, key, value, prior=prior, is_causal=True)
    assert COUNT == H
    group = rank // (H // HK)
    heads = [side[:, at : at + 1] for side, at in ((query, rank), (key, group), (value, group))]
    output = prior_attention(*heads, prior=prior.heads(range(rank, rank + 1)), is_causal=True)
    assert_close(output, whole[:, rank : rank + 1])
    gradients = [
        torch.autograd.grad(part.square().sum(), list(prior.parameters()))
        for part in (output, prior_attention(query, key, value, prior=prior, is_causal=True))
    ]
    for own, of_all in zip(*gradients, strict=True):
        own = own.contiguous()  # gloo sums other layouts wrongly
        dist.all_reduce(own)
        assert_close(own, of_all)


def all_queries_and_keys(rank):
    """(H, L, D) contents of a transport problem with a prior, and a function that takes the shard of this process."""
    query, key, _, _ = (tensor.detach() for tensor in content(torch.float64))
    key = key.repeat_interleave(H // HK, dim=1)
    prior = FourierPrior(H, num_frequencies=2)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8)))
    return query, key, prior.freeze(), lambda tensor: tensor[:, :, shard(rank)]


def log_sum_exp(query, keys, prior, positions, bias):
    """ln sum_j exp(score_ij + log_prior_ij + bias_j) over the keys of all processes, (B, H, Q)."""
    shards = zip(keys, Gather.apply(bias), range(COUNT), strict=True)
    parts = [
        prior_attention(
            query, key, key, prior=prior, key_bias=of_keys, query_positions=positions, key_positions=shard(owner),
            return_lse=True,
        )
        for key, of_keys, owner in shards
    ]  # fmt: skip
    return merge(*zip(*parts, strict=True))[1]


def two_sided_transport(rank):
    """Sinkhorn's half-steps are log-sum-exps, which merge; residual and dual value are sums over processes."""
    query, key, prior, own = all_queries_and_keys(rank)
    at, log_share = torch.arange(LENGTH), -torch.tensor(LENGTH).double().log()
    log_prior = prior.dense(at, at, dtype=torch.float64)
    marginal = torch.full((LENGTH,), 1 / LENGTH, dtype=torch.float64)
    problem = TransportProblem(query @ key.mT / D**0.5, log_prior=log_prior, key_marginal=marginal)
    expected = solve(problem, Newton(tolerance=1e-12))
    assert expected.converged.all()

    query, key, mine = own(query), own(key), shard(rank)
    queries, keys = Gather.apply(query), Gather.apply(key)
    of_keys = torch.zeros(key.shape[:3], dtype=torch.float64)
    for _ in range(80):
        of_queries = -log_sum_exp(query, keys, prior, mine, of_keys)
        received = log_sum_exp(key, queries, TransposedPrior(prior), mine, of_queries + log_share)
        residual = ((of_keys + received).exp() - 1 / LENGTH).abs().sum(-1)
        of_keys = log_share - received
    of_queries = -log_sum_exp(query, keys, prior, mine, of_keys)
    reference = log_prior[:, mine].exp().sum((1, 2)).expand(B, H) / LENGTH  # of the queries here, mass one each / n
    sums = torch.stack([residual, of_keys.mean(-1) / COUNT, of_queries.mean(-1) / COUNT, reference])
    dist.all_reduce(sums)
    residual, shift, mean, reference = sums
    assert residual.max() < 1e-12
    # masses of 1 / n that are right to 1e-12 leave potentials n times as uncertain, and more where P P^T is near one
    assert_close(of_keys - shift[..., None], own(expected.key_potential), tolerance=1e-9)
    assert_close(of_queries + shift[..., None], own(expected.query_potential), tolerance=1e-9)
    assert_close(shift + mean + reference - 1, expected.dual)


def statistics_add(rank):
    """Each process has its queries, in two runs, and all keys: what it sums adds to what one process sums."""
    query, key, prior, _ = all_queries_and_keys(rank)

    def sums(start, stop):
        def rows(first, last):
            return prior.dense(torch.arange(start + first, start + last), torch.arange(stop), dtype=torch.float64)

        options = {"log_prior": rows, "is_causal": True, "query_start": start}
        seen = row_statistics(query[:, :, start:stop], key[:, :, :stop], **options)
        return SequenceStatistics.of(seen)

    size = LENGTH // (2 * COUNT)
    runs = [sums(part * size, (part + 1) * size) for part in (rank, 2 * COUNT - 1 - rank)]
    everyone = [None] * COUNT
    dist.all_gather_object(everyone, runs[0].continued(runs[1]))
    total, whole = reduce(SequenceStatistics.continued, everyone), sums(0, LENGTH)
    for name in ("num_queries", "num_margins", "key_mass", "column_mass", "column_count", "lag_mass"):
        assert_close(getattr(total, name), getattr(whole, name))
    for name, value in whole.sums.items():
        assert_close(total.sums[name], value)


CASES = (
    merged_double,
    merged_single,
    merged_documents,
    engine_with_positions_left_out,
    engine_with_positions_as_buffer,
    engine_with_grouped_queries,
    engine_without_balance,
    refused_by_engine,
    heads_of_one_process,
    two_sided_transport,
    statistics_add,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run_together(CASES, COUNT, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_four_processes_agree_with_one(folder, case):
    for report in reports(case, folder):
        pytest.fail(report)
