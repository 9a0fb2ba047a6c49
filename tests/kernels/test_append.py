"""Lanes beside content are pieces of the products, whoever writes them, and gradients are the sums that follow.

The kernel needs a GPU, or Triton's interpreter with ``TRITON_INTERPRET=1``; the plain form needs neither.
"""

import os

import pytest
import torch
from tolerances import assert_close, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from eotattn import PriorAttention
from eotattn.attention import KeyValueCache, PackedDocuments, prior_attention
from eotattn.kernels import append as door
from eotattn.priors import FourierPrior, KeyTablePrior, RecencyPrior, SinkPrior, goat_prior
from eotattn.priors.lane_sides import Side

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
HAS_KERNEL = DEVICE == "cuda" or (INTERPRETED and door.HAS_TRITON)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="needs a GPU or Triton's interpreter")
#: Twice the unit roundoff: the interpreter cuts digits off where a GPU rounds.
CUT = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHARED, SAMPLES = "one table", "a table a sample"


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)


def make_side(heads, length, *, columns=7, width=5, depth=3, batch=None, own=True, more=0, dtype=torch.bfloat16):
    """A side whose lanes are all leading pieces, then all second ones, ..."""
    lead = () if batch is None else (batch,)
    matrix = numbers(heads if own else 1, columns, width, seed=2).repeat(1, 1, depth).requires_grad_()
    piece = torch.arange(depth).repeat_interleave(width).to(DEVICE, torch.int8)
    extra = numbers(*lead, heads, length, more, seed=3, dtype=dtype).requires_grad_() if more else None
    return Side(numbers(*lead, length, columns, seed=1), matrix, piece, depth, extra)


def exact_products(side, pieces=1):
    """(..., heads or 1, L, P / depth) float64, and a bound of what float32 sums may lose of them."""
    table, matrix = side.table.double().unsqueeze(-3), side.matrix[..., : side.matrix.shape[-1] // side.depth].double()
    return table @ matrix, side.table.shape[-1] * 2**-23 * (table.abs() @ matrix.abs())


def check_lanes(appended, content, side, far, dtype):
    """Content as it was, products within the digits of so many pieces, further lanes and zeros as they are."""
    width = content.shape[-1]
    assert torch.equal(appended[..., :width], content)
    place = width
    if side is not None:
        exact, lost = exact_products(side)
        lanes = appended[..., width : width + side.matrix.shape[-1]].double()
        parts = lanes.unflatten(-1, (side.depth, -1)).cumsum(-2).unbind(-2)
        for count, total in enumerate(parts, start=1):
            bound = CUT[dtype] ** count * exact.abs() + 2 * lost + 2 * torch.finfo(dtype).smallest_normal
            assert ((total - exact).abs() <= bound).all()
        place += side.matrix.shape[-1]
        if side.more is not None:
            assert torch.equal(
                appended[..., place : place + side.more.shape[-1]], side.more.expand(*content.shape[:-1], -1)
            )
            place += side.more.shape[-1]
    if far is not None:
        assert torch.equal(appended[..., place : place + 1], far.expand(*content.shape[:-1], 1))
        place += 1
    assert (appended[..., place:] == 0).all()


def exact_gradients(grad, content, side):
    """Of content, matrix and further lanes, float64."""
    width, lanes = content.shape[-1], side.matrix.shape[-1]
    leading = grad[..., width : width + lanes].double() * (side.piece == 0)
    table = side.table.double().expand(grad.shape[0], -1, -1)
    of_matrix = torch.einsum("blc,bhlp->hcp", table, leading)
    found = [grad[..., :width].double(), of_matrix.sum_to_size(side.matrix.shape)]
    if side.more is not None:
        of_more = grad[..., width + lanes : width + lanes + side.more.shape[-1]].double()
        found.append(of_more.sum_to_size(side.more.shape))
    return found


#: (B, H, Hk, Q, K, D), columns and lanes of a piece: odd sizes, one token, more than one block of everything.
SIZES = [((2, 4, 2, 37, 41, 12), 7, 5), ((1, 3, 3, 70, 1, 5), 1, 1), ((2, 2, 1, 9, 33, 20), 70, 23)]


@needs_kernel
@pytest.mark.parametrize("dtype", CUT, ids=str)
@pytest.mark.parametrize("tables", [SHARED, SAMPLES])
@pytest.mark.parametrize("own", [True, False], ids=["a matrix a head", "one matrix"])
@pytest.mark.parametrize(("shape", "columns", "lanes"), SIZES)
def test_the_kernel_writes_lanes_and_sums_their_gradients(shape, columns, lanes, own, tables, dtype):
    batch, heads, kv_heads, queries, keys, width = shape
    query = numbers(batch, heads, queries, width, dtype=dtype).requires_grad_()
    key = numbers(batch, kv_heads, keys, width, seed=9, dtype=dtype).requires_grad_()
    given = {"columns": columns, "width": lanes, "own": own, "batch": batch if tables == SAMPLES else None}
    sides = make_side(heads, queries, dtype=dtype, **given), make_side(kv_heads, keys, dtype=dtype, more=3, **given)
    sides = (sides[0]._replace(more=numbers(heads, queries, 3, dtype=dtype).requires_grad_()), sides[1])
    far = torch.full((1, 1, 1, 1), 1.5, dtype=dtype, device=DEVICE), numbers(batch, 1, keys, 1, dtype=dtype)
    assert door.uses_kernel((query, key), sides)
    appended = door.append(query, key, *sides, far)
    grads = [numbers(*side.shape, seed=4, dtype=dtype) for side in appended]
    for side, content, grad, lane, given_side in zip(appended, (query, key), grads, far, sides, strict=True):
        check_lanes(side.detach(), content.detach(), given_side, lane, dtype)
        found = torch.autograd.grad(side, [content, given_side.matrix, given_side.more], grad, retain_graph=True)
        for actual, expected in zip(found, exact_gradients(grad, content, given_side), strict=True):
            assert_close(actual, expected, tolerance=None if actual.dtype != torch.float32 else 1e-5)
    together = torch.autograd.grad(appended, [query, key, sides[0].matrix, sides[1].matrix], grads)
    for matrix, grad, content, side in zip(together[2:], grads, (query, key), sides, strict=True):
        assert_close(matrix, exact_gradients(grad, content, side)[1], tolerance=1e-5)


@pytest.mark.parametrize("dtype", [*CUT, torch.float64], ids=str)
def test_the_plain_form_writes_the_same(dtype):
    content = numbers(2, 4, 37, 12, dtype=dtype)
    side = make_side(4, 37, more=2, dtype=dtype)
    if dtype == torch.float64:
        side = side._replace(table=side.table.double(), matrix=side.matrix.detach().double())
        lanes = door.append_plainly(content, side)[..., 12:17]
        assert_close(lanes, exact_products(side)[0].expand(2, -1, -1, -1))
        return
    check_lanes(door.append_plainly(content, side).detach(), content, side, None, dtype)


STRIDES = {
    "tokens before heads": lambda: numbers(2, 37, 4, 12).transpose(1, 2),
    "a part of a projection": lambda: numbers(2, 37, 3 * 48)[..., 48:96].unflatten(-1, (4, 12)).transpose(1, 2),
    "one number further": lambda: numbers(2 * 4 * 37 * 12 + 1)[1:].view(2, 4, 37, 12),
    "no unit stride": lambda: numbers(2, 4, 12, 37).mT,
    "one sample for all": lambda: numbers(1, 4, 37, 12).expand(2, -1, -1, -1),
    "every other token": lambda: numbers(2, 4, 74, 12)[:, :, ::2],
}


@needs_kernel
@pytest.mark.parametrize("name", STRIDES)
def test_content_and_its_gradient_lie_anywhere(name):
    content, side = STRIDES[name](), make_side(4, 37, dtype=torch.float32)
    leaf = content.detach().requires_grad_()
    appended = door.append_one(leaf, side)
    check_lanes(appended.detach(), content, side, None, torch.float32)
    grad = torch.zeros(2, 4, appended.shape[-1], 37, device=DEVICE).mT.copy_(numbers(*appended.shape, seed=5))
    for upstream in (grad, grad.contiguous(), grad.sum().expand(appended.shape)):
        found = torch.autograd.grad(appended, [leaf, side.matrix], upstream, retain_graph=True)
        for actual, expected in zip(found, exact_gradients(upstream, content, side), strict=True):
            assert_close(actual, expected)


@needs_kernel
def test_rows_of_a_table_stand_beside_one_token():
    table = numbers(3, 50, 7)
    for per_sample, start in ((True, 0), (True, 31), (False, 17)):
        rows = table[:, start : start + 1] if per_sample else table[0, start : start + 1]
        side = make_side(4, 1)._replace(table=rows)
        content = numbers(3, 4, 1, 12, dtype=torch.bfloat16)
        with torch.inference_mode():
            appended = door.append_one(content, side, width=48)
        assert appended.shape == (3, 4, 1, 48)
        check_lanes(appended, content, side, None, torch.bfloat16)


@needs_kernel
def test_a_side_may_be_missing():
    query, key = numbers(2, 4, 9, 12).requires_grad_(), numbers(2, 2, 11, 12).requires_grad_()
    far = torch.ones(1, 1, 1, 1, device=DEVICE), numbers(2, 1, 11, 1)
    for lane in (None, far):
        appended = door.append(query, key, None, None, lane)
        for side, content, one in zip(appended, (query, key), lane or (None, None), strict=True):
            check_lanes(side.detach(), content.detach(), None, one, torch.float32)
        grads = [numbers(*side.shape, seed=6) for side in appended]
        for found, grad in zip(torch.autograd.grad(appended, [query, key], grads), grads, strict=True):
            assert torch.equal(found, grad[..., :12])
    side = make_side(4, 9, depth=1, width=4)  # four lanes on one side, four numbers as they are on the other
    other = Side(
        numbers(11, 0), numbers(1, 0, 0), torch.zeros(0, dtype=torch.int8, device=DEVICE), 1, numbers(2, 11, 4)
    )
    appended = door.append(query, key, side, other, None)
    check_lanes(appended[0].detach(), query.detach(), side, None, torch.float32)
    assert torch.equal(appended[1][..., 12:16], other.more.expand(2, -1, -1, -1))


@needs_kernel
def test_only_what_learns_gets_gradients():
    query, key = numbers(2, 4, 9, 12), numbers(2, 2, 11, 12).requires_grad_()
    sides = make_side(4, 9), make_side(2, 11)
    sides[0].matrix.requires_grad_(False)
    appended = door.append(query, key, *sides, None)
    grads = [numbers(*side.shape, seed=6) for side in appended]
    of_key, of_matrix = torch.autograd.grad(appended, [key, sides[1].matrix], grads)
    assert_close(of_key, grads[1][..., :12].double())
    assert_close(of_matrix, exact_gradients(grads[1], key, sides[1])[1])


@needs_kernel
def test_sums_are_the_same_in_every_run():
    length = 7000 if DEVICE == "cuda" else 150
    content, side = numbers(2, 3, length, 8, dtype=torch.bfloat16).requires_grad_(), make_side(3, length)
    upstream = numbers(2, 3, length, door.append_one(content, side).shape[-1], dtype=torch.bfloat16)
    first, *others = (torch.autograd.grad(door.append_one(content, side), side.matrix, upstream)[0] for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


@needs_kernel
def test_gradients_have_gradients():
    content, side = numbers(2, 3, 9, 4).requires_grad_(), make_side(3, 9, more=2, dtype=torch.float32)

    def second(append):
        leaves = [content, side.matrix, side.more]
        first = torch.autograd.grad(append(content, side).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((one * one.detach().cos()).sum() for one in first), leaves)

    for actual, expected in zip(second(door.append_one), second(door.append_plainly), strict=True):
        assert_close(actual, expected)


def test_other_calls_take_the_plain_form():
    content, side = numbers(2, 3, 9, 4), make_side(3, 9)
    assert door.uses_kernel((content,), (side,)) == HAS_KERNEL
    wide = side._replace(table=side.table.double(), matrix=side.matrix.detach().double())
    assert not door.uses_kernel((content.double(),), (wide,))
    assert not door.uses_kernel((torch.nn.Buffer(content),), (side,)) or type(torch.nn.Buffer(content)) is torch.Tensor
    assert not door.uses_kernel((content[:0],), (side,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not door.uses_kernel((content,), (side,))
    seen = []

    def watched(one):
        seen.append(door.uses_kernel((one,), (side,)))
        return door.append_one(one.unsqueeze(0), side).squeeze(0)

    batched = torch.func.vmap(watched)(content)
    assert seen == [False]
    assert_close(batched.detach(), door.append_plainly(content, side).detach())


def test_compiled_calls_take_the_plain_form(monkeypatch):
    content, side = numbers(2, 3, 9, 4), make_side(3, 9)
    expected = door.append_one(content, side).detach()
    monkeypatch.setattr(door, "_launches", None)
    torch.compiler.reset()
    compiled = torch.compile(lambda one: door.append_one(one, side), backend="eager", fullgraph=True)
    assert_close(compiled(content).detach(), expected)


# Through the whole call -----------------------------------------------------------------------------------------------

PRIORS = {
    "goat": lambda heads: goat_prior(heads, num_frequencies=3),
    "recency and sink": lambda heads: RecencyPrior(heads) + SinkPrior(heads),
    "multiple": lambda heads: 0.7 * FourierPrior(heads, 2) + SinkPrior(heads, 0),
    "table": lambda heads: KeyTablePrior(heads, 19) + RecencyPrior(heads),
}


def trained(name, heads):
    prior, generator = PRIORS[name](heads), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return prior.to(DEVICE)


def own_positions():
    at = torch.stack([torch.arange(19), torch.arange(0, 19).flip(0)]).to(DEVICE)
    return {"query_positions": at, "key_positions": at}


CALLS = {
    "whole": dict,
    "padded": lambda: {"key_padding_mask": (torch.arange(19, device=DEVICE) % 7 == 3).expand(2, -1)},
    "positions of every sample": own_positions,
    "documents": lambda: {"documents": PackedDocuments([12, 7, 5, 14])},
}


@needs_kernel
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_calls_with_the_kernel_are_those_of_the_definition(name, kv_heads, call, dtype, monkeypatch):
    prior, calls = trained(name, 2), []
    launches = door._launches()
    monkeypatch.setattr(door, "_launches", lambda: calls.append(1) or launches)
    content = [numbers(2, heads, 19, 12, seed=n, dtype=dtype) for n, heads in enumerate((2, kv_heads, kv_heads))]
    weight = numbers(2, 2, 19, 12, seed=7)

    def run(content, backend):
        leaves = [one.detach().requires_grad_() for one in content]
        output = prior_attention(*leaves, prior=prior, is_causal=True, backend=backend, **CALLS[call]())
        gradients = torch.autograd.grad(output, [*leaves, *prior.parameters()], weight.to(output.dtype))
        return [output, *gradients[:3], torch.cat([one.flatten() for one in gradients[3:]])]

    found = run(content, "sdpa")
    assert calls
    bound = 1e-4 if dtype == torch.float32 else 0.1  # of parameters: sums over all tokens of numbers of 8 bits
    for actual, expected in zip(found, run([one.double() for one in content], "reference"), strict=True):
        assert (actual.double() - expected).norm() <= bound * expected.norm() + 1e-5


@needs_kernel
def test_a_decoding_step_uses_the_kernel(monkeypatch):
    layer = PriorAttention(32, 4, prior=trained("goat", 4), batch_first=True).to(DEVICE)
    x, calls, launches = numbers(2, 9, 32), [], door._launches()
    with torch.inference_mode():
        expected = layer(x, is_causal=True, need_weights=False)[0]
        monkeypatch.setattr(door, "_launches", lambda: calls.append(1) or launches)
        cache = layer.make_cache(2, 9)
        assert isinstance(cache, KeyValueCache)
        steps = [layer(x[:, t : t + 1], is_causal=True, need_weights=False, cache=cache)[0] for t in range(9)]
    assert len(calls) == 9
    assert relative_error(torch.cat(steps, dim=1), expected) < 1e-4
