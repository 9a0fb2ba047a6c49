"""Priors that decay smoothly: fitted exponentials with an evaluated error, against dense float64; bounds; refusals."""

import math

import pytest
import torch
from attention.test_near_far import LargestTensor, content, dense, size_of_error
from priors.cases import off_neutral
from tolerances import assert_close

from eotattn import prior_attention
from eotattn.attention import explain
from eotattn.priors import AlibiPrior, HeadsPrior, KerplePrior, T5Prior
from eotattn.priors.exponentials import fit

H = 4
PRIORS = {
    "log": lambda: off_neutral(KerplePrior(H)),
    "weak power": lambda: weak_power(),
    "sum with buckets": lambda: off_neutral(KerplePrior(H)) + off_neutral(T5Prior(H)),
    "heads": lambda: HeadsPrior(off_neutral(KerplePrior(2)), (1, 0, 0, 1)) * (0.5, 1.0, 2.0, -1.0),
}


def weak_power():
    prior = KerplePrior(H, "power")
    with torch.no_grad():
        prior.exponent.copy_(torch.tensor([0.1, 0.2, 0.3, 0.15]))
    return prior


HIDDEN = (torch.arange(700) > 640).expand(2, -1)
PATTERNS = {
    "causal": (700, 700, 0, {"is_causal": True}),
    "full": (700, 700, 0, {}),
    "whole blocks": (512, 512, 0, {}),
    "padding": (700, 700, 0, {"key_padding_mask": HIDDEN}),
    "mask of keys": (700, 700, 0, {"attn_mask": torch.linspace(-1, 2, 700).sin().expand(2, H, 1, 700).double()}),
    "chunk": (300, 900, 600, {"is_causal": True}),
    "early chunk": (130, 250, 120, {"is_causal": True}),
    "inner chunk": (200, 600, 150, {}),
    "last token": (1, 900, 899, {"is_causal": True}),
    "window": (700, 700, 0, {"is_causal": True, "window": 200}),
}


@pytest.mark.parametrize(
    ("name", "pattern"), [*(("log", pattern) for pattern in PATTERNS), *((name, "full") for name in PRIORS)]
)
def test_outputs_and_gradients_are_those_of_dense_attention_up_to_the_stated_error(name, pattern):
    prior, (queries, keys, first, options) = PRIORS[name](), PATTERNS[pattern]
    operands = [side.requires_grad_() for side in content(queries, keys)]
    learned = [*operands, *prior.parameters()]
    known = {"padding" if option == "key_padding_mask" else option: value for option, value in options.items()}
    call = {"prior": prior, "query_positions": first, "key_positions": 0, "tolerance": 1e-4, **options}
    stated = explain(*operands, backend="near_far", **call).error_bound
    assert stated <= 1e-4
    results = (
        prior_attention(*operands, backend="near_far", return_lse=True, **call),
        dense(*operands, prior, first=first, **known),
    )
    tolerance = 10 * stated + 1e-12
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, tolerance=tolerance)
    gradients = [torch.autograd.grad(output.sin().sum() + lse.sum(), learned) for output, lse in results]
    for ours, expected in zip(*gradients, strict=True):
        assert_close(ours, expected, tolerance=tolerance + 1e-5)


@pytest.mark.parametrize(("reach", "furthest"), [(128, 900), (160, 131_072 - 160)])
def test_the_evaluated_error_is_the_largest_of_all_lags(reach, furthest):
    prior = off_neutral(KerplePrior(H))
    form, lags = prior.far_form(), torch.arange(1, furthest + 1, dtype=torch.float64)
    found = fit(form.past.decay, reach, furthest, torch.device("cpu"))
    sums = found.prior.amplitudes @ torch.exp(-torch.tensor(found.prior.rates, dtype=torch.float64)[:, None] * lags)
    amplitude, rate = (parameter.detach().double().abs()[:, None] for parameter in prior.parameters())
    error = (sums + found.constant[:, None] + amplitude * torch.log(1 + rate * (lags + reach))).abs().max()
    assert float(error.detach()) == pytest.approx(found.error, rel=1e-3)
    assert found.error <= 5e-3


def row_as_kernels_see_it(prior, length, dtype, row, tolerance=None):
    """The log-prior of a row up to a constant, from lanes of ``dtype``, and the largest stated error of its parts."""
    reach = block = 128
    found = fit(prior.far_form().past.decay, reach, length - 1 - reach, torch.device("cpu"))
    log_prior = prior.dense(torch.tensor([row]), torch.arange(row + 1), dtype=torch.float64)[:, 0].detach().clone()
    shifted, bound = row - reach, 0.0
    number, size, edge = shifted // block, block, shifted // block * block
    while number:
        if number % 2:
            at, distances = torch.tensor([shifted - edge]), torch.arange(size, 0, -1)
            lanes = found.prior.lanes(at, distances, dtype=dtype, tolerance=tolerance)
            seen = lanes.dense().detach().double()[:, 0] + found.constant.detach()[:, None]
            log_prior[:, edge - size : edge] = seen
            bound = max(bound, lanes.error_bound)
            edge -= size
        number, size = number // 2, 2 * size
    assert edge == 0
    return log_prior, found.error + bound


def test_rows_at_131_072_tokens_in_bfloat16_are_within_the_stated_total_variation():
    """KERPLE's log form at the paper's range of amplitudes: at most 1e-3, by the bound and as measured."""
    prior, length = KerplePrior(H), 131_072
    for row in (length - 1, 100_003):
        seen, error = row_as_kernels_see_it(prior, length, torch.bfloat16, row)
        bound = math.tanh(error / 2)
        exact = prior.dense(torch.tensor([row]), torch.arange(row + 1), dtype=torch.float64)[:, 0].detach()
        score = 2 * torch.randn(row + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(row))
        variation = ((score + seen).softmax(-1) - (score + exact).softmax(-1)).abs().sum(-1).max() / 2
        assert float(variation) <= bound <= 1e-3


def test_the_last_tokens_of_131_072_in_bfloat16():
    prior, keys = KerplePrior(H), 131_072
    query, key, value = content(200, keys, torch.bfloat16, key_heads=H, width=16, batch=1)
    at = {"query_positions": keys - 200, "key_positions": 0, "is_causal": True}
    with torch.no_grad():
        output = prior_attention(query, key, value[..., :16], prior=prior, backend="near_far", **at)
        plain = prior_attention(query, key, value[..., :16], **{**at, "is_causal": False})
    rows = torch.arange(0, 200, 37)
    expected = dense(query, key, value[..., :16], prior, rows, keys - 200, is_causal=True)[0].detach()
    error = size_of_error(output[:, :, rows], expected)
    assert error <= 1.5 * size_of_error(plain[:, :, rows], dense(query, key, value[..., :16], None, rows, keys)[0])


def test_no_tensor_grows_with_the_square_of_the_tokens():
    prior, largest = PRIORS["log"](), []
    for length in (2048, 4096):
        operands = [side.requires_grad_() for side in content(length, length)]
        with LargestTensor() as counter:
            output = prior_attention(*operands, prior=prior, backend="near_far", tolerance=1e-3)
            output.sum().backward()
        largest.append(counter.numel)
    assert largest[1] <= 2 * largest[0]
    assert largest[1] < 4096 * 4096 / 4


def test_explain_says_how_exact_it_is():
    operands = content(1000, 1000, torch.bfloat16)
    told = explain(*operands, prior=KerplePrior(H), is_causal=True)
    assert told.backend == "near_far"
    assert "the log-prior in full within 128 tokens, by blocks; exponentials within" in told.reason
    assert "total variation at most" in told.reason
    assert 0 < told.error_bound <= 2e-3
    assert explain(*(side.float() for side in operands), prior=KerplePrior(H)).backend == "reference"


def call(prior, tolerance=None, **options):
    return lambda: prior_attention(
        *content(700, 700, torch.float32), prior=prior, backend="near_far", tolerance=tolerance, **options
    )


REFUSED = {
    "too steep": (call(KerplePrior(H, "power"), 1e-6), "its decay is a sum of exponentials within .* are allowed"),
    "no tolerance": (call(off_neutral(KerplePrior(H))), "1.2e-07 are allowed; pass a larger tolerance"),
    "lanes beside": (call(KerplePrior(H) + AlibiPrior(H), 1.0), "beside a prior with lanes has no form far away"),
    "elsewhere": (call(KerplePrior(H), 1.0, query_positions=300, key_positions=0), "queries that are among the keys"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exponentials_is_refused_with_the_reason(name):
    attend, reason = REFUSED[name]
    with pytest.raises(NotImplementedError, match=reason) as caught:
        attend()
    assert "\n" not in str(caught.value)


def test_windows_have_no_error():
    operands = content(700, 700)
    told = explain(*operands, prior=KerplePrior(H), is_causal=True, window=200)
    assert (told.backend, told.error_bound) == ("near_far", 0.0)
