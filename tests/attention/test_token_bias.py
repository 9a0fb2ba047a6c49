"""Biases and factors that tokens decide: the same as in a dense log-prior, in any form of the call."""

import itertools
from dataclasses import replace

import pytest
import torch
from attention.oracles import attention, causal, normal
from priors.cases import off_neutral
from tolerances import assert_close

from eotattn.attention import KeyValueCache, PackedDocuments, explain, prior_attention
from eotattn.attention.backends import BACKENDS
from eotattn.attention.call import AttentionCall
from eotattn.attention.operands import lanes_of, operands
from eotattn.integrations import capture
from eotattn.priors import FourierPrior, KeyTablePrior, RecencyPrior, RelativeBiasPrior, goat_prior

B, H, HK, L, D, V = 2, 6, 3, 53, 8, 5
HEADS = [1, HK, H]
PRIORS = {
    "none": lambda: None,
    "goat": lambda: off_neutral(goat_prior(H, num_frequencies=2, length_scale=30.0)),
    "key table": lambda: off_neutral(KeyTablePrior(H, 9)),
}


def content(dtype=torch.float64, length=L):
    shapes = ((B, H, length, D), (B, HK, length, D), (B, HK, length, V))
    return [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def bias_of(heads, length=L, *, seed=7):
    return 3 * normal(B, heads, length, seed=seed)


def by_query_head(bias):
    return torch.stack([bias[:, h * bias.shape[1] // H] for h in range(H)], 1)


def dense(prior, bias, query_at, key_at):
    own = 0.0 if prior is None else prior.dense(query_at, key_at, dtype=torch.float64).detach()
    return own + by_query_head(bias)[:, :, None, :]


def padding():
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask[0, 30:40] = True
    mask[1, :3] = mask[1, 49:] = True
    return mask


PATTERNS = {
    "causal": ({"is_causal": True}, lambda at: causal(at, at)),
    "everything": ({}, lambda at: torch.ones(L, L, dtype=torch.bool)),
    "window": ({"is_causal": True, "window": 7}, lambda at: causal(at, at) & (at[:, None] - at < 7)),
    "padding": (
        {"is_causal": True, "key_padding_mask": padding()},
        lambda at: causal(at, at) & ~padding()[:, None, None],
    ),
    "mask of pairs": (
        {"attn_mask": (normal(L, L, seed=3) > 0), "is_causal": True},
        lambda at: causal(at, at) & (normal(L, L, seed=3) > 0),
    ),
    "mask of keys": (
        {"attn_mask": normal(B, 1, 1, L, seed=4) > -1},
        lambda at: (normal(B, 1, 1, L, seed=4) > -1).expand(B, 1, L, L),
    ),
}


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_bias_is_a_log_prior_of_keys(pattern, name, heads, backend):
    prior, inputs, bias, at = PRIORS[name](), content(), bias_of(heads), torch.arange(L)
    arguments, seen = PATTERNS[pattern]
    expected, _ = attention(*inputs, log_prior=dense(prior, bias, at, at), allowed=seen(at))
    assert_close(prior_attention(*inputs, prior=prior, key_bias=bias, backend=backend, **arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
def test_dtypes(heads, dtype):
    prior, inputs, bias, at = PRIORS["goat"](), content(dtype), 5 * bias_of(heads), torch.arange(L)
    expected, _ = attention(*inputs, log_prior=dense(prior, bias, at, at), allowed=causal(at, at))
    output = prior_attention(*inputs, prior=prior, key_bias=bias, is_causal=True, backend="sdpa")
    assert_close(output, expected, tolerance=1e-2 if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("heads", HEADS)
def test_gradients(heads, backend):
    prior, inputs, bias = PRIORS["goat"](), [x.requires_grad_() for x in content()], bias_of(heads).requires_grad_()
    of_queries, gains = (normal(B, H, L, seed=n).abs().requires_grad_() for n in (11, 12))
    at, upstream, wanted = torch.arange(L), normal(B, H, L, V, seed=9), [*inputs, bias, of_queries, gains]
    own = prior.dense(at, at, dtype=torch.float64)
    query, key, value = inputs
    key, value = (x.repeat_interleave(H // HK, 1) for x in (key, value))
    score = query @ key.mT / D**0.5 + gains[..., None] * own
    score = score + by_query_head(bias)[:, :, None] + of_queries[..., None]
    output = score.masked_fill(~causal(at, at), -torch.inf).softmax(-1) @ value
    expected = torch.autograd.grad(output, [*wanted, *prior.parameters()], upstream)
    found = prior_attention(
        *inputs, prior=prior, key_bias=bias, query_bias=of_queries, query_gains=gains, is_causal=True, backend=backend
    )
    assert_close(found, output.detach())
    for actual, exact in zip(
        torch.autograd.grad(found, [*wanted, *prior.parameters()], upstream), expected, strict=True
    ):
        assert_close(actual, exact)


def test_a_bias_of_queries_alone_has_no_effect_and_a_gradient_of_zero():
    inputs, bias = content(), normal(B, H, L).requires_grad_()
    output = prior_attention(*inputs, query_bias=bias, is_causal=True)
    assert_close(output, prior_attention(*inputs, is_causal=True))
    assert float(torch.autograd.grad(output.sum(), bias)[0].abs().max()) < 1e-12


def test_biases_in_float32_are_added_in_the_dtype_of_the_call():
    """A sum of forgetting gates and its half of the query cancel: float32 would round both before that."""
    inputs, sums = content(), (3e4 * normal(B, H, L)).float()
    options = {"is_causal": True, "backend": "reference", "return_lse": True}
    for found, expected in zip(
        prior_attention(*inputs, key_bias=-sums, query_bias=sums, **options),
        prior_attention(*inputs, key_bias=-sums.double(), query_bias=sums.double(), **options),
        strict=True,
    ):
        assert_close(found, expected)


@pytest.mark.parametrize("heads", HEADS)
def test_shared_biases_share_lanes(heads):
    lanes = lanes_of(AttentionCall.from_arguments(*content(torch.bfloat16), key_bias=bias_of(heads)))
    assert lanes.num_lanes == (3 * H // HK if heads == H else 3)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", [*PRIORS])
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_cache_keeps_the_bias_of_earlier_tokens(is_padded, name, heads):
    prior, inputs, bias = PRIORS[name](), content(), bias_of(heads)
    cache = KeyValueCache(B, HK, L, D, V, prior=prior, dtype=torch.float64)
    outputs, pad = [], padding()[1:].expand(B, L)
    with torch.no_grad():
        for start, stop in itertools.pairwise([0, 20, 21, 22, 40, L]):
            new = [side[:, :, start:stop] for side in (*inputs, bias)]
            masks = {"key_padding_mask": pad[:, start:stop]} if is_padded else {}
            outputs.append(
                prior_attention(*new[:3], prior=prior, key_bias=new[3], is_causal=True, cache=cache, **masks)
            )
    at = torch.arange(L)
    positions = ((~pad[0]).cumsum(0) - 1).clamp(min=0) if is_padded else at
    allowed = causal(at, at) & ~pad[:, None, None] if is_padded else causal(at, at)
    expected, _ = attention(*inputs, log_prior=dense(prior, bias, positions, positions), allowed=allowed)
    assert_close(torch.cat(outputs, 2), expected)


def test_a_cache_stores_lanes_of_the_bias_and_makes_none_twice(monkeypatch):
    prior, inputs, bias = PRIORS["goat"](), content(torch.bfloat16), bias_of(H)
    cache = KeyValueCache(B, HK, L, D, V, prior=prior, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = prior_attention(*inputs, prior=prior, key_bias=bias, is_causal=True)
        monkeypatch.setattr("eotattn.attention.operands._sides", None)
        parts = [prior_attention(*(x[:, :, t : t + 1] for x in inputs), prior=prior, is_causal=True, cache=cache,
                                 key_bias=bias[:, :, t : t + 1]) for t in range(L)]  # fmt: skip
    assert_close(torch.cat(parts, 2), expected, tolerance=2e-2)


def test_a_cache_crops_and_reorders_the_bias():
    prior, inputs, bias = PRIORS["goat"](), content(), bias_of(H)
    cache = KeyValueCache(B, HK, L, D, V, prior=prior, dtype=torch.float64)

    def step(start, stop, order=slice(None)):
        new = [side[order, :, start:stop] for side in (*inputs, bias)]
        with torch.no_grad():
            return prior_attention(*new[:3], prior=prior, key_bias=new[3], is_causal=True, cache=cache)

    step(0, 30)
    cache.crop(20)
    cache.reorder(torch.tensor([1, 0]))
    found = step(20, 40, [1, 0])
    expected = prior_attention(*inputs, prior=prior, key_bias=bias, is_causal=True)[[1, 0], :, 20:40]
    assert_close(found, expected.detach())


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("is_causal", [True, False])
def test_documents_are_alone(is_causal, window):
    if window is not None and not is_causal:
        pytest.skip("a window is causal")
    prior, inputs, bias, lengths = PRIORS["goat"](), content(), bias_of(H), [20, 33, 53]
    options = {"prior": prior, "is_causal": is_causal, "window": window}
    packed = prior_attention(*inputs, key_bias=bias, documents=PackedDocuments(lengths), **options)
    for sample, start, stop in ((0, 0, 20), (0, 20, 53), (1, 0, 53)):
        alone = [side[sample : sample + 1, :, start:stop] for side in (*inputs, bias)]
        expected = prior_attention(*alone[:3], key_bias=alone[3], **options)
        assert_close(packed[sample : sample + 1, :, start:stop], expected.detach())


def test_a_cache_takes_a_bias_with_every_token_or_with_none():
    inputs, bias = content(), bias_of(H)
    first, second = ([side[:, :, span] for side in (*inputs, bias)] for span in (slice(0, 9), slice(9, 12)))
    for with_bias in (True, False):
        cache = KeyValueCache(B, HK, L, D, V, dtype=torch.float64)
        arguments = [{"key_bias": new[3]} if at == with_bias else {} for at, new in ((True, first), (False, second))]
        prior_attention(*first[:3], is_causal=True, cache=cache, **arguments[0])
        with pytest.raises(ValueError, match="KeyValueCache: key_bias must be given for every token or for none"):
            prior_attention(*second[:3], is_causal=True, cache=cache, **arguments[1])
        assert cache.length == 9
    cache = KeyValueCache(B, HK, L, D, V, dtype=torch.float64)
    prior_attention(*first[:3], key_bias=first[3], is_causal=True, cache=cache)
    with pytest.raises(ValueError, match=r"KeyValueCache: key_bias must have shape \(2, 6, 3\)"):
        prior_attention(*second[:3], key_bias=second[3][:, :1], is_causal=True, cache=cache)


def test_a_prior_without_lanes_takes_the_reference():
    prior, inputs, bias, at = off_neutral(RelativeBiasPrior(H, 3)), content(), bias_of(H), torch.arange(L)
    expected, _ = attention(*inputs, log_prior=dense(prior, bias, at, at), allowed=causal(at, at))
    assert_close(prior_attention(*inputs, prior=prior, key_bias=bias, is_causal=True), expected)


def test_explain_counts_its_lanes():
    inputs = content(torch.bfloat16)
    plain, biased = (explain(*inputs, is_causal=True, key_bias=bias) for bias in (None, bias_of(1)))
    assert (plain.num_lanes, biased.num_lanes) == (0, 3)
    assert "rides in lanes" in biased.reason
    assert 0 < biased.error_bound < 1e-4


def test_capture_sees_the_bias():
    class Model(torch.nn.Module):
        def forward(self, bias):
            return prior_attention(*content(), prior=PRIORS["goat"](), key_bias=bias, is_causal=True)

    bias, at = bias_of(HK), torch.arange(L)
    _, weights = attention(*content(), log_prior=dense(PRIORS["goat"](), bias, at, at), allowed=causal(at, at))
    model = Model()
    with capture(model) as seen:
        model(bias)
    (statistics,) = seen.values() if isinstance(seen, dict) else seen.layers.values()
    assert_close(statistics.column_mass.double(), weights.sum(2), tolerance=1e-5)


def test_capture_sees_the_bias_of_queries_alone_beside_sinks():
    class Model(torch.nn.Module):
        def forward(self, bias):
            return prior_attention(*content(), query_bias=bias, sinks=torch.zeros(H), is_causal=True)

    bias, at = 3 * normal(B, H, L, seed=8), torch.arange(L)
    _, plain = attention(*content(), allowed=causal(at, at))
    query, key, _ = content()
    scores = query @ key.repeat_interleave(H // HK, 1).mT / D**0.5
    lse = scores.masked_fill(~causal(at, at), -torch.inf).logsumexp(-1) + bias
    model = Model()
    with capture(model) as seen:
        model(bias)
    (statistics,) = seen.layers.values()
    assert_close(statistics.column_mass.double(), (plain * lse.sigmoid()[..., None]).sum(2), tolerance=1e-5)


def test_explain_counts_the_lane_of_a_bias_of_queries_that_trains():
    bias = normal(B, H, L).requires_grad_()
    for prior in (None, RecencyPrior(H)):
        call = AttentionCall.from_arguments(*content(), prior=prior, query_bias=bias, is_causal=True)
        width = explain(*content(), prior=prior, query_bias=bias, is_causal=True).width
        assert width == operands(call)[0].shape[-1]


def test_factors_of_a_query_are_those_of_some_terms():
    parts, inputs, at = [off_neutral(FourierPrior(H, 3)), RecencyPrior(H)], content(), torch.arange(L)
    slope = normal(B, H, L, seed=5).abs()
    own, recency = (part.dense(at, at, dtype=torch.float64).detach() for part in parts)
    expected, _ = attention(*inputs, log_prior=own + slope[..., None] * recency, allowed=causal(at, at))
    prior = parts[0] + parts[1]
    for backend in ("sdpa", "reference"):
        output = prior_attention(*inputs, prior=prior, query_gains=(None, slope), is_causal=True, backend=backend)
        assert_close(output, expected)


def test_factors_of_a_query_in_sixteen_bits_and_beside_a_cache():
    prior, inputs, gain, at = PRIORS["goat"](), content(torch.bfloat16), normal(B, H, L, seed=5).abs(), torch.arange(L)
    log_prior = gain[..., None] * prior.dense(at, at, dtype=torch.float64).detach()
    expected, _ = attention(*inputs, log_prior=log_prior, allowed=causal(at, at))
    output = prior_attention(*inputs, prior=prior, query_gains=gain, is_causal=True, backend="sdpa")
    assert_close(output, expected, tolerance=1e-2)
    cache = KeyValueCache(B, HK, L, D, V, prior=prior, dtype=torch.bfloat16)
    with torch.no_grad():
        parts = [
            prior_attention(*(x[:, :, a:b] for x in inputs), prior=prior, is_causal=True, cache=cache,
                            query_gains=gain[:, :, a:b]) for a, b in ((0, 30), (30, 31), (31, L))
        ]  # fmt: skip
    assert_close(torch.cat(parts, 2), expected, tolerance=1e-2)


def test_gradients_of_factors_in_sixteen_bits_are_free_of_what_rows_leave():
    """A steep slope times a far position multiplies what rounding leaves of a row's sum."""
    length, slope = 1024, 0.5
    prior, upstream = RecencyPrior(1, mean_lags=[1 / (torch.tensor(slope).exp().item() - 1)]), normal(1, 1, length, 32)
    inputs = [normal(1, 1, length, 32, seed=seed, dtype=torch.bfloat16) for seed in range(1, 4)]
    gain = (0.5 + normal(1, 1, length, seed=5).abs()).requires_grad_()
    output = prior_attention(*inputs, prior=prior, query_gains=gain, is_causal=True, backend="sdpa")
    found = torch.autograd.grad(output, gain, upstream.to(torch.bfloat16))[0]
    at = torch.arange(length)
    log_prior = -slope * gain[..., None] * (at[:, None] - at)
    exact, _ = attention(*inputs, log_prior=log_prior, allowed=causal(at, at))
    expected = torch.autograd.grad(exact, gain, upstream.to(torch.bfloat16).double())[0]
    assert float((found - expected).norm() / expected.norm()) <= 0.1


def test_flex_adds_the_bias_to_scores_and_refuses_to_train_it():
    inputs, bias = content(torch.float32), bias_of(HK).float()
    flex = BACKENDS["flex"]
    call = AttentionCall.from_arguments(*inputs, key_bias=bias)
    assert "cpu" in flex.refusal(call)
    index = [torch.tensor(n) for n in (1, 4, 2, 30)]
    found = flex.score_mod(call)(torch.tensor(0.5), *index)
    assert_close(found, 0.5 + bias[1, 2, 30])
    assert_close(
        flex.score_mod(replace(call, query_bias=bias[:, :1]))(torch.tensor(0.5), *index), found + bias[1, 0, 2]
    )


@pytest.mark.parametrize("total", [(130.0, 1e-5), (1316.0, 1e-4), (13143.0, 5e-4)])
def test_long_sums_are_exact_in_bfloat16(total):
    """Total variation between the weights of a late query and those in float64; at 131 072 keys."""
    decay, bound = total
    length = 131072
    steps = 2 * decay / length * torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bias = steps.cumsum(0)[None, None]
    query, key = normal(1, 1, 1, 64, dtype=torch.bfloat16), normal(1, 1, length, 64, seed=1, dtype=torch.bfloat16)
    call = AttentionCall.from_arguments(query, key, key, key_bias=bias, query_positions=length - 1, scale=1 / 8)
    lanes = lanes_of(call)
    score = query.double() @ key.double().mT / 8
    exact = (score + bias.unsqueeze(2)).softmax(-1)
    found = (score + lanes.dense().double() / 8).softmax(-1)
    assert 0.5 * float((found - exact).abs().sum()) <= bound
    assert float((lanes.dense() / 8 - bias).abs().max()) <= lanes.error_bound / 8
