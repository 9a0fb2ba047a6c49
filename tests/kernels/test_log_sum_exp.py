"""The call that returns output and log-sum-exp against its definition, forward and backward, on every route."""

import os

import numpy as np
import pytest
import torch
from tolerances import assert_close

from eotattn.kernels import log_sum_exp

SHAPES = [(5, 7, 3, 4), (7, 5, 6, 2), (33, 33, 8, 9), (1, 1, 1, 1)]
ROUTES = ["cpu", "blocks"]


def operands(sizes, dtype=torch.float64):
    queries, keys, width, value_width = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    shapes = (queries, width), (keys, width), (keys, value_width)
    return [torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def definition(query, key, value, scale, is_causal):
    logits = scale * torch.einsum("bhqd,bhkd->bhqk", query, key)
    if is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
    exponential = (logits - logits.amax(-1, keepdim=True)).exp()
    total = exponential.sum(-1, keepdim=True)
    return exponential @ value / total, (total.log() + logits.amax(-1, keepdim=True)).squeeze(-1)


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    monkeypatch.setattr(log_sum_exp, "route", lambda *_, **__: request.param)
    monkeypatch.setitem(log_sum_exp._BLOCK_ELEMENTS, "cpu", 64)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", SHAPES)
def test_forward_is_the_definition(route, sizes, is_causal, dtype):
    query, key, value = operands(sizes, dtype)
    output, total = log_sum_exp.attend(query, key, value, scale=0.7, is_causal=is_causal)
    wide = [tensor.double() for tensor in (query, key, value)]
    expected_output, expected_total = definition(*wide, 0.7, is_causal)
    assert output.dtype == dtype
    assert_close(output, expected_output.to(dtype))
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(total, expected_total.to(total.dtype))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", SHAPES)
def test_gradients_of_both_outputs(route, sizes, is_causal):
    leaves = [tensor.requires_grad_() for tensor in operands(sizes)]
    generator = torch.Generator().manual_seed(1)
    outputs = log_sum_exp.attend(*leaves, scale=0.7, is_causal=is_causal)
    above = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
    found = torch.autograd.grad(outputs, leaves, above)
    expected = torch.autograd.grad(definition(*leaves, 0.7, is_causal), leaves, above)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


def test_the_log_sum_exp_alone(route):
    query, key, value = operands(SHAPES[0])
    output, total = log_sum_exp.attend(query, key, scale=1.0)
    assert output.shape == (2, 3, 5, 0)
    assert_close(total, definition(query, key, value, 1.0, False)[1])
    query.requires_grad_()
    (found,) = torch.autograd.grad(log_sum_exp.attend(query, key, scale=1.0)[1].sum(), query)
    (expected,) = torch.autograd.grad(definition(query, key, value, 1.0, False)[1].sum(), query)
    assert_close(found, expected)


def test_huge_logits_stay_finite(route):
    query, key, value = operands(SHAPES[0])
    output, total = log_sum_exp.attend(1e3 * query, 1e2 * key, value, scale=1.0)
    assert output.isfinite().all()
    assert total.isfinite().all()


def test_second_derivatives_are_refused_rather_than_wrong():
    query, key, value = (tensor.requires_grad_() for tensor in operands(SHAPES[0]))
    output, _ = log_sum_exp.attend(query, key, value, scale=1.0)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(output.sum(), query, create_graph=True)


def test_half_precision_on_the_cpu_goes_by_blocks():
    query, _, value = operands(SHAPES[0], torch.float16)
    assert log_sum_exp.route(query, value) == "blocks"


@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("kind", ["pairs", "of keys", "added"])
def test_masks_and_shared_key_heads(route, kind, kv_heads):
    """Rows without keys have output zero, log-sum-exp -inf and no gradient; key heads may be shared."""
    masked_and_shared(kind, kv_heads, torch.float64, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("kind", ["pairs", "of keys", "added"])
def test_masks_and_shared_key_heads_on_the_gpu(kind, kv_heads, dtype):
    masked_and_shared(kind, kv_heads, dtype, "cuda")


def masked_and_shared(kind, kv_heads, dtype, device):
    query, key, value = operands((33, 45, 8, 6), dtype)
    key, value = key[:, :kv_heads], value[:, :kv_heads]
    seen = torch.rand(2, 1, 33, 45, generator=torch.Generator().manual_seed(5)) > 0.5
    seen = seen[:, :, :1].clone() if kind == "of keys" else seen
    seen[1, :, :, :] = seen[1] & (torch.arange(seen.shape[-2]) != 0)[:, None]  # one row has none
    added = torch.where(seen, operands((33, 45, 8, 6))[0][:, :1, :, :1], -torch.inf).to(dtype)
    mask = added if kind == "added" else seen
    leaves = [tensor.to(device).requires_grad_() for tensor in (query, key, value)]
    output, total = log_sum_exp.attend(*leaves, scale=0.7, mask=mask.to(device))
    wide = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    keys, values = (side.repeat_interleave(3 // kv_heads, 1) for side in wide[1:])
    logits = 0.7 * wide[0] @ keys.mT + (added.double() if kind == "added" else 0.0)
    has = seen.any(-1, keepdim=True)
    logits = torch.where(has, logits.masked_fill(~seen, -torch.inf), 0.0)
    expected = torch.where(has, logits.softmax(-1) @ values, 0.0)
    expected_total = torch.where(has.squeeze(-1), logits.logsumexp(-1), -torch.inf)
    assert_close(output.cpu(), expected.to(dtype))
    assert torch.equal(total.cpu().isneginf(), expected_total.isneginf())
    held = has.squeeze(-1).expand(total.shape)
    assert_close(total.cpu()[held], expected_total[held].to(total.dtype))
    found = torch.autograd.grad(output.sum() + total[held.to(device)].sum(), leaves)
    for ours, theirs in zip(found, torch.autograd.grad(expected.sum() + expected_total[held].sum(), wide), strict=True):
        assert_close(ours.cpu(), theirs.to(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_on_the_gpu(dtype, is_causal):
    query, key, value = operands((300, 300, 72, 40), dtype)
    leaves = [tensor.cuda().requires_grad_() for tensor in (query, key, value)]
    expected = definition(*(tensor.double() for tensor in (query, key, value)), 0.1, is_causal)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            output, total = log_sum_exp.attend(*leaves, scale=0.1, is_causal=is_causal)
        assert_close(output.cpu(), expected[0].to(dtype))
        assert_close(total.cpu(), expected[1].to(total.dtype))
    wide = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    above = [torch.ones_like(output), torch.ones_like(total)]
    found = torch.autograd.grad([output, total], leaves, above)
    truth = torch.autograd.grad(definition(*wide, 0.1, is_causal), wide, [a.cpu().double() for a in above])
    for ours, theirs in zip(found, truth, strict=True):
        assert_close(ours.cpu(), theirs.to(dtype))


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.gpu
@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 77, 131, 24), (2, 130, 5, 64), (1, 1, 1, 3), (2, 65, 700, 100)])
@pytest.mark.parametrize("multiprocessors", [1, 16])
def test_the_kernel_for_the_log_sum_exp_alone(sizes, dtype, multiprocessors, monkeypatch):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies the bit patterns of bfloat16")
    kernel = pytest.importorskip("eotattn.kernels.log_sum_exp_triton")
    monkeypatch.setattr(kernel, "_multiprocessors", lambda device: multiprocessors)
    batch, rows, keys, width = sizes
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(batch, size, width, generator=generator).to(dtype) for size in (rows, keys))
    bias = torch.randn(batch, keys, generator=generator)
    bias[:, 1:2] = -float("inf")
    bias[-1, : keys // 2] = -float("inf")  # a span without keys
    bias[0] = bias[0] if batch == 1 else -float("inf")  # no keys at all
    device = "cpu" if INTERPRETED else "cuda"
    with np.errstate(divide="ignore"):  # the interpreter's logarithm of nothing
        found = kernel.launch(query.to(device), key.to(device), bias.to(device), 0.3).cpu()
    logits = 0.3 * query.double() @ key.double().mT + bias.double()[:, None]
    expected = logits.logsumexp(-1).float()
    assert torch.equal(found == -float("inf"), expected == -float("inf"))
    assert_close(found.nan_to_num(neginf=0.0), expected.nan_to_num(neginf=0.0))
