"""What explain says is what prior_attention does."""

import pytest
import torch

from eotattn.attention import explain, prior_attention
from eotattn.kernels import flex, reference, sdpa
from eotattn.priors import RecencyPrior, TablePrior, goat_prior

H = 4
CALLS = {
    "plain": {},
    "lanes": {"prior": goat_prior(H, num_frequencies=2), "is_causal": True},
    "no lanes": {"prior": TablePrior(H, 3)},
    "weights": {"prior": RecencyPrior(H), "return_weights": True},
    "named": {"prior": RecencyPrior(H), "backend": "reference"},
    "padded": {"key_padding_mask": torch.tensor([[False, True, False, False, False]])},
}


def content(dtype=torch.float32, kv_heads=H):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, H, 5, 8), (1, kv_heads, 5, 8), (1, kv_heads, 5, 8))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_the_backend_named_is_the_backend_used(arguments, monkeypatch):
    used = []
    for name, kernel in (("sdpa", sdpa), ("flex", flex), ("reference", reference)):
        attend = kernel.attend

        def watched(*given, name=name, attend=attend, **named):
            used.append(name)
            return attend(*given, **named)

        monkeypatch.setattr(kernel, "attend", watched)
    explanation = explain(*content(), **arguments)
    assert used == []
    prior_attention(*content(), **arguments)
    assert used == [explanation.backend]
    assert set(explanation.alternatives) == {"sdpa", "flex", "varlen", "reference"} - {explanation.backend}


def test_a_refusal_is_explained_and_not_raised():
    arguments = {"prior": TablePrior(H, 3), "backend": "sdpa"}
    explanation = explain(*content(), **arguments)
    assert explanation.backend is None
    assert "sdpa cannot serve the call with TablePrior" in explanation.reason
    with pytest.raises(NotImplementedError, match="TablePrior"):
        prior_attention(*content(), **arguments)


def test_width_lanes_and_error_are_those_of_the_call():
    prior = goat_prior(H, num_frequencies=2)
    single = explain(*content(), prior=prior, is_causal=True)
    assert (single.num_lanes, single.width) == (6, 14)
    half = explain(*content(torch.bfloat16), prior=prior, is_causal=True)
    assert half.num_lanes == prior.num_lanes(torch.bfloat16)
    assert half.error_bound > single.error_bound > 0
    shared = explain(*content(kv_heads=2), prior=prior, is_causal=True)
    assert shared.num_lanes == 7  # u(j) of the two query heads that share a key head lie side by side
    assert explain(*content(), **CALLS["padded"]).num_lanes == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_fused_one(dtype):
    explanation = explain(*content(dtype), prior=goat_prior(H), is_causal=True)
    assert explanation.kernel == "flash_attention"
    assert "flash_attention" in str(explanation)
    assert "not reference" in str(explanation)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="backend must be one of"):
        explain(*content(), backend="fastest")
    with pytest.raises(ValueError, match="have the query's 4 heads"):
        explain(*content(), prior=RecencyPrior(3))
