"""Lanes that a kernel multiplies out are those that the factors define, forward and backward.

Needs a GPU, or Triton with ``TRITON_INTERPRET=1`` for its interpreter on a CPU.
"""

import os

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from eotattn.attention import PackedDocuments, backends, prior_attention
from eotattn.attention.call import AttentionCall
from eotattn.attention.joined import MOST_SAMPLES, joined
from eotattn.kernels.join_layout import PartShape
from eotattn.priors import FourierPrior, RecencyPrior, SinkPrior, goat_prior

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
PRIORS = {
    "goat": lambda heads: goat_prior(heads, num_frequencies=3),
    "recency and sink": lambda heads: RecencyPrior(heads) + SinkPrior(heads),
    "multiple": lambda heads: 0.7 * FourierPrior(heads, 2) + SinkPrior(heads, 0),
}


def inputs(heads, kv_heads, dtype, length=37, width=12):
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, heads, length, width), (2, kv_heads, length, width), (2, kv_heads, length, width)]
    return [torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes]


def trained(name, heads):
    prior, generator = PRIORS[name](heads), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return prior.to(DEVICE)


def run(prior, content, padded, backend, attend=prior_attention, **arguments):
    padding = torch.zeros(2, content[0].shape[2], dtype=torch.bool, device=DEVICE)
    padding[0, 5:9] = True
    mask = padding if padded else None
    output = attend(*content, prior=prior, key_padding_mask=mask, backend=backend, **({"is_causal": True} | arguments))
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE, output.dtype)
    return [output, *torch.autograd.grad(output, [*content, *prior.parameters()], weight)]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)], ids=["fp32", "bf16"])
def test_joined_lanes_are_the_lanes_of_the_factors(name, kv_heads, padded, dtype, bound, monkeypatch):
    # the bound of 6e-2 is for gradients of parameters, sums over all tokens of numbers rounded to bfloat16
    prior, content = trained(name, 4), inputs(4, kv_heads, dtype)
    used, joined = [], backends.joined

    def counted(call):
        used.append(joined(call))
        return used[-1]

    monkeypatch.setattr(backends, "joined", counted)
    found = run(prior, content, padded, "sdpa")
    assert used[0] is not None
    wide = [tensor.detach().double().requires_grad_() for tensor in content]
    for actual, expected in zip(found, run(prior, wide, padded, "reference"), strict=True):
        assert (actual.double() - expected).norm() <= bound * expected.norm() + 1e-6


#: Positions that differ from sample to sample, and those that only look as if they might.
OWN_POSITIONS = {
    "left padding": lambda: {s: torch.stack([torch.arange(37), torch.arange(-9, 28)]).to(DEVICE) for s in SIDES},
    "queries alone": lambda: {"query_positions": torch.stack([torch.arange(37), torch.arange(5, 42)]).to(DEVICE)},
    "range of keys": lambda: {
        "query_positions": torch.stack([torch.arange(90, 127), torch.arange(95, 132)]).to(DEVICE),
        "key_positions": range(90, 127),
    },
    "range of queries": lambda: {
        "query_positions": range(90, 127),
        "key_positions": torch.stack([torch.arange(80, 117), torch.arange(90, 127)]).to(DEVICE),
    },
    "one row": lambda: {s: torch.arange(3, 40)[None].to(DEVICE) for s in SIDES},
    "documents": lambda: {"documents": PackedDocuments([20, 17, 5, 32])},
}
SIDES = ("query_positions", "key_positions")


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("own", OWN_POSITIONS)
def test_samples_with_positions_of_their_own_read_their_own_rows(own, padded, monkeypatch):
    if own == "documents" and padded:
        pytest.skip("padding is a document")
    prior, content, used = trained("goat", 4), inputs(4, 2, torch.float32), []

    def counted(call):
        used.append(joined(call))
        return used[-1]

    monkeypatch.setattr(backends, "joined", counted)
    found = run(prior, content, padded, "sdpa", **OWN_POSITIONS[own]())
    assert used[0] is not None
    wide = [tensor.detach().double().requires_grad_() for tensor in content]
    for actual, expected in zip(found, run(prior, wide, padded, "reference", **OWN_POSITIONS[own]()), strict=True):
        assert (actual.double() - expected).norm() <= 1e-3 * expected.norm() + 1e-6


@pytest.mark.parametrize("own", ["left padding", "range of keys", "range of queries", "one row"])
def test_samples_with_positions_of_their_own_have_their_own_padding(own):
    """Causal calls mask pairs there, so that the padding lane is that of calls that see both ways."""
    prior, content = trained("goat", 4), inputs(4, 2, torch.float32)
    arguments = OWN_POSITIONS[own]() | {"is_causal": False}
    wide = [tensor.detach().double().requires_grad_() for tensor in content]
    expected = run(prior, wide, True, "reference", **arguments)
    for actual, wanted in zip(run(prior, content, True, "sdpa", **arguments), expected, strict=True):
        assert (actual.double() - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6


def called(batch, positions):
    """Whether the kernel joins a call of that many samples with these positions."""
    query = torch.zeros(batch, 4, 3, 8, device=DEVICE)
    sides = dict.fromkeys(SIDES, positions.to(DEVICE))
    return joined(AttentionCall.check(query, query, query, prior=RecencyPrior(4).to(DEVICE), **sides)) is not None


def test_many_samples_with_positions_of_their_own_have_lanes_from_factors():
    rows = torch.arange(3) + torch.arange(64).unsqueeze(1)
    assert called(MOST_SAMPLES, rows[:MOST_SAMPLES])
    assert not called(MOST_SAMPLES + 1, rows[: MOST_SAMPLES + 1])
    assert not called(64, rows)
    assert called(64, rows[0])
    assert called(64, rows[:1])


def test_graphs_take_lanes_from_factors_where_samples_have_positions_of_their_own():
    prior, content = trained("goat", 4), inputs(4, 2, torch.float32)
    attend = torch.compile(prior_attention, fullgraph=True, backend="aot_eager")
    positions = OWN_POSITIONS["left padding"]()
    expected = run(prior, content, False, "sdpa", **positions)
    for actual, wanted in zip(run(prior, content, False, "sdpa", attend, **positions), expected, strict=True):
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm() + 1e-6


def test_lanes_count_positions_from_near_the_last_key():
    """From zero, a slope times a position of 200 000 would leave an fp32 accumulator a few digits of the score."""
    prior, at = trained("recency and sink", 4).parts[0], range(199_900, 200_000)
    query, key = (torch.zeros(1, heads, 100, 8, dtype=torch.bfloat16, device=DEVICE) for heads in (4, 1))
    call = AttentionCall.check(query, key, key, prior=prior, query_positions=at, key_positions=at, is_causal=True)
    query, key = (side.detach().float() for side in backends.joined(call))
    total = torch.zeros(1, 4, 100, 100, device=DEVICE)
    for lane in range(8, query.shape[-1]):
        total += query[..., lane, None] * key[..., lane].unsqueeze(-2)
    positions = torch.tensor(at, device=DEVICE)
    exact = prior.dense(positions, positions, dtype=torch.float64).detach()
    error = (total.double() * call.scale - exact) - (total.double() * call.scale - exact).mean(-1, keepdim=True)
    assert error.abs().max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padding_outweighs_the_log_prior_of_keys_far_ahead(dtype):
    prior, keys = RecencyPrior(4).to(DEVICE), torch.tensor([0, 1, 2, 60_000], device=DEVICE)
    query, key = (torch.zeros(1, 4, 4, 8, dtype=dtype, device=DEVICE) for _ in range(2))
    call = AttentionCall.check(query, key, key, prior=prior, key_positions=keys, key_padding_mask=(keys > 2)[None])
    joined = [side.detach().double() for side in backends.joined(call)]
    assert all(side.isfinite().all() for side in joined)
    score = call.scale * joined[0] @ joined[1].mT
    assert (score[..., :3].amax(-1) - score[..., 3] > 1e6).all()


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", PRIORS)
def test_compiled_graphs_hold_the_same_kernel_as_one_operator(name, padded):
    prior, content, graphs = trained(name, 4), inputs(4, 2, torch.bfloat16), []

    def look(graph, example_inputs):
        graphs.append({node.target for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    attend = torch.compile(prior_attention, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    found, expected = (run(prior, content, padded, "sdpa", way) for way in (attend, prior_attention))
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)
    assert torch.ops.eotattn.join.default in graphs[0]
    assert any(torch.ops.eotattn.join_backward.default in graph for graph in graphs[1:])


def test_the_operators_keep_the_rules_of_operators():
    part = PartShape(((0, 1), (1, 0)), (1, 1), True, 2, False, False, True, True)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 8), (2, 2, 7, 8), (5, 5), (7, 3), (4,), (4, 1))
    made = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    query, key, first, second, *learned = made
    tail = ([tensor.requires_grad_() for tensor in learned], part.numbers(), [1.0, 2.0, 0.5, 1.0], 2, 3.0)
    sides = (query.requires_grad_(), key.requires_grad_(), first, second)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.eotattn.join, (*sides, None, 0.0, *tail), test_utils=tests)


def test_the_second_derivative_is_refused():
    prior, content = trained("goat", 4), inputs(4, 4, torch.float32)
    output = prior_attention(*content, prior=prior, is_causal=True, backend="sdpa")
    (gradient,) = torch.autograd.grad(output.sum(), prior.parts[1].strength, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_prior_of_more_tensors_than_the_kernel_takes_rides_in_lanes_of_its_factors():
    prior = trained("recency and sink", 4)
    many = prior + trained("recency and sink", 4)
    content = inputs(4, 4, torch.float32)
    call = AttentionCall.check(*content, prior=many, is_causal=True)
    assert backends.joined(call) is None
    difference = run(many, content, False, "sdpa")[0] - run(2.0 * prior, content, False, "sdpa")[0]
    assert difference.abs().max() <= 1e-4
