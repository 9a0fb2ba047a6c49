"""Lanes that a kernel multiplies out are those that the factors define, forward and backward.

Needs a GPU, or Triton with ``TRITON_INTERPRET=1`` for its interpreter on a CPU.
"""

import os

import pytest
import torch

from eotattn.attention import backends, prior_attention
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


def run(prior, content, padded, backend):
    padding = torch.zeros(2, content[0].shape[2], dtype=torch.bool, device=DEVICE)
    padding[0, 5:9] = True
    mask = padding if padded else None
    output = prior_attention(*content, prior=prior, is_causal=True, key_padding_mask=mask, backend=backend)
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


def test_slope_gradients_are_not_rounding(monkeypatch):
    """Without the residual the error grows with the position and exceeds the signal; with it, it stays small."""
    generator = torch.Generator().manual_seed(6)
    content = [torch.randn(1, 2, 256, 16, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(3)]
    content = [tensor.requires_grad_() for tensor in content]
    prior, errors = RecencyPrior(2).to(DEVICE), []
    wide = [tensor.detach().double().requires_grad_() for tensor in content]
    expected = run_slopes(prior, wide, "reference")
    for replacement in (backends.joined, lambda call: None):
        monkeypatch.setattr(backends, "joined", replacement)
        found = run_slopes(prior, content, "sdpa")
        errors.append(float((found.double() - expected).norm() / expected.norm()))
    assert errors[0] <= 0.05
    assert errors[0] < errors[1]


def run_slopes(prior, content, backend):
    at = range(3000, 3256)
    output = prior_attention(
        *content, prior=prior, query_positions=at, key_positions=at, is_causal=True, backend=backend
    )
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(DEVICE, output.dtype)
    return torch.autograd.grad(output, [prior.strength], weight)[0]
