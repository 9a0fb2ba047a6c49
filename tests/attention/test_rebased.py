"""Calls that count from close by: against dense float64 softmax, with gradients; sums that one call is too coarse for.

Legend: B batch, H query heads, HK key heads, L tokens, D width.
"""

import pytest
import torch
from attention.oracles import attention, causal, normal
from priors.cases import off_neutral
from tolerances import assert_close

from eotattn.attention import (
    AttentionSinks,
    KeyValueCache,
    PackedDocuments,
    PriorAttention,
    explain,
    prior_attention,
    rebased,
)
from eotattn.attention.backends import choose
from eotattn.attention.call import AttentionCall
from eotattn.priors import DensePrior, ForgettingPrior, RecencyPrior, RelativeBiasPrior, goat_prior

B, H, HK, L, D = 2, 4, 2, 77, 8
PADDING = torch.zeros(B, L, dtype=torch.bool)
PADDING[0, :20] = PADDING[1, 60:] = True
SEEN = causal(torch.arange(L), torch.arange(L))

PRIORS = {
    "none": lambda: None,
    "relative": lambda: RecencyPrior(H),
    "of keys too": lambda: off_neutral(goat_prior(H, num_frequencies=2)),
}
PATTERNS = {
    "full": (L, 0, {}),
    "causal": (L, 0, {"is_causal": True}),
    "padding": (L, 0, {"is_causal": True, "key_padding_mask": PADDING}),
    "mask of keys": (L, 0, {"is_causal": True, "attn_mask": torch.arange(L).sin().expand(B, H, 1, L).double()}),
    "chunk": (20, 57, {"is_causal": True}),
    "early chunk": (13, 30, {"is_causal": True}),
    "last token": (1, L - 1, {"is_causal": True}),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(rebased, "BLOCK", 8)


def content(queries=L, dtype=torch.float64):
    return [normal(B, *shape, seed=n, dtype=dtype) for n, shape in enumerate(((H, queries, D), (HK, L, D), (HK, L, 9)))]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("bias_heads", [None, 1, HK, H])
def test_it_is_the_dense_definition_with_gradients(bias_heads, name, pattern):
    queries, first, options = PATTERNS[pattern]
    prior, inputs, of_queries = PRIORS[name](), content(queries), 10 * normal(B, H, queries, seed=4)
    gain = None if name == "none" else normal(B, H, queries, seed=6).abs()
    bias = None if bias_heads is None else 5 * normal(B, bias_heads, L, seed=3).cumsum(-1)
    wanted = [x.requires_grad_() for x in (*inputs, of_queries, bias, gain) if x is not None]
    at, keys = torch.arange(queries) + first, torch.arange(L)
    log_prior = of_queries[..., None].expand(B, H, queries, L)
    if bias is not None:
        log_prior = log_prior + bias.repeat_interleave(H // bias_heads, 1)[:, :, None]
    if prior is not None:
        wanted += list(prior.parameters())
        log_prior = log_prior + gain[..., None] * prior.dense(at, keys, dtype=torch.float64)
    if "attn_mask" in options:
        log_prior = log_prior + options["attn_mask"]
    allowed = causal(at, keys) if "is_causal" in options else torch.ones(queries, L, dtype=torch.bool)
    if "key_padding_mask" in options:
        allowed = allowed & ~PADDING[:, None, None]
    expected, _ = attention(*inputs, log_prior=log_prior, allowed=allowed)
    score = inputs[0] @ inputs[1].repeat_interleave(H // HK, 1).mT / D**0.5 + log_prior
    expected_lse = score.masked_fill(~allowed, -torch.inf).logsumexp(-1)
    gains = () if gain is None else gain
    found, lse = prior_attention(
        *inputs, prior=prior, query_positions=first, key_bias=bias, query_bias=of_queries, query_gains=gains,
        backend="rebased", return_lse=True, **options,
    )  # fmt: skip
    assert_close(found, expected.detach(), tolerance=1e-11)
    empty = expected_lse.isinf()
    assert bool((lse.isinf() == empty).all())
    sides = [(output, total.masked_fill(empty, 0.0)) for output, total in ((found, lse), (expected, expected_lse))]
    assert_close(sides[0][1], sides[1][1].detach(), tolerance=1e-11)
    upstream = normal(*found.shape, seed=7), normal(*lse.shape, seed=8)
    each = [torch.autograd.grad(side, wanted, upstream, allow_unused=True) for side in sides]
    for actual, exact in zip(*each, strict=True):
        if exact is not None:
            assert_close(actual, exact, tolerance=1e-5 if exact.dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("decay", [130.0, 1316.0, 13143.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_sums_are_exact(dtype, decay, monkeypatch):
    """Late queries at 131 072 keys; ``auto`` sees what one call would lose. Counted from the last key, as c - c_j."""
    monkeypatch.setattr(rebased, "BLOCK", 128)
    length, queries = 131_072, 150
    steps = 2 * decay / length * torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bias = steps.cumsum(0)[None, None]
    inputs = [normal(1, 1, count, 16, seed=n, dtype=dtype) for n, count in enumerate((queries, length, length))]
    at = torch.arange(length)
    expected, _ = attention(*inputs, log_prior=(bias - bias[..., -1:])[:, :, None], allowed=causal(at[-queries:], at))
    output = prior_attention(*inputs, key_bias=bias, query_positions=length - queries, is_causal=True)
    assert_close(output, expected, tolerance=1e-5 if dtype == torch.float32 else 1e-12)


def test_it_is_chosen_where_one_call_would_err_too_much():
    def chosen(spread, dtype=torch.float32, **options):
        bias = torch.linspace(0, spread, L, dtype=torch.float64).expand(B, 1, L)
        return choose(
            AttentionCall.from_arguments(*content(dtype=dtype), key_bias=bias, is_causal=True, **options)
        ).name

    assert chosen(100.0) == "sdpa"
    assert chosen(1000.0) == "rebased"
    assert chosen(1000.0, tolerance=1e-3) == "sdpa"
    assert chosen(1000.0, torch.float64) == "sdpa"
    assert chosen(1000.0, torch.bfloat16) == "sdpa"
    assert chosen(1000.0, torch.bfloat16, tolerance=1e-5) == "rebased"
    assert chosen(1000.0, window=5) != "rebased"


def test_explain_says_what_it_does():
    bias = torch.linspace(0, 1000, L, dtype=torch.float64).expand(B, 1, L)
    inputs, options = content(dtype=torch.float32), {"key_bias": bias, "is_causal": True}
    told, coarse = (explain(*inputs, backend=backend, **options) for backend in ("auto", "sdpa"))
    assert told.backend == "rebased"
    assert "from close by" in str(told)
    assert coarse.error_bound > 1e-5
    assert told.error_bound < coarse.error_bound / 5


def test_padding_may_have_any_bias():
    """Keys are counted from the largest bias that is seen, and what is not seen does not choose the backend."""
    inputs = content(dtype=torch.float32)
    calm = normal(B, H, L, seed=3, dtype=torch.float64)
    wild = calm.masked_fill(PADDING[:, None], 1e20)
    wanted, *_ = attention(*inputs, log_prior=calm[:, :, None], allowed=SEEN & ~PADDING[:, None, None])
    options = {"is_causal": True, "key_padding_mask": PADDING}
    output = prior_attention(*inputs, key_bias=wild, backend="rebased", **options)
    assert (output.double() - wanted).abs().max() < 1e-5
    assert not rebased.is_worth_it(AttentionCall.from_arguments(*inputs, key_bias=calm, **options))
    assert not rebased.is_worth_it(AttentionCall.from_arguments(*inputs, key_bias=wild, **options))


def test_the_bound_holds_for_queries_whose_keys_are_all_far_below_their_block():
    query, key, _ = content(dtype=torch.float32)
    value = torch.eye(L).expand(B, HK, L, L)  # so that outputs are weights
    bias = 3000 * ((torch.arange(L) + 1) // 8) + normal(B, H, L, seed=3)  # the last key of a block is far above it
    options = {"is_causal": True, "key_bias": bias, "backend": "rebased"}
    weights = prior_attention(query, key, value, **options).double()
    wanted, *_ = attention(query, key, value, log_prior=bias[:, :, None], allowed=SEEN)
    chosen = (wanted > 1e-6) & (weights > 0)
    errors = (weights.log() - wanted.log())[chosen].abs()
    told = explain(query, key, value, **options).error_bound
    assert errors.max() < 2 * told + 1e-5  # twice: of a weight and of the sum that it is divided by
    assert told > 1e-4


def test_slope_gradients_beside_a_sink_are_right_in_bfloat16(monkeypatch):
    """One call rounds them relative to positions (0.19 off), rectangles relative to lags (0.03)."""
    monkeypatch.setattr(rebased, "BLOCK", 128)
    length, heads, slope = 2048, 2, 0.5
    prior, upstream = RecencyPrior(heads), normal(1, heads, length, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        prior.strength.copy_(slope / torch.tensor(prior.unit_slopes))
    inputs = [normal(1, heads, length, 32, seed=n, dtype=torch.bfloat16) for n in range(1, 4)]
    slopes = prior.slopes.detach().double().requires_grad_()
    at = torch.arange(length)
    log_prior = -slopes[:, None, None] * (at[:, None] - at)
    score = (inputs[0].double() @ inputs[1].double().mT / 32**0.5 + log_prior).masked_fill(~causal(at, at), -torch.inf)
    with_sink = torch.cat([score, torch.zeros(1, heads, length, 1)], -1).softmax(-1)[..., :-1]
    (exact,) = torch.autograd.grad(with_sink @ inputs[2].double(), slopes, upstream.double())
    errors = []
    for backend in ("sdpa", "rebased"):
        output = prior_attention(*inputs, prior=prior, sinks=torch.zeros(heads), is_causal=True, backend=backend)
        (found,) = torch.autograd.grad(output, prior.strength, upstream)
        found = found.double() / torch.tensor(prior.unit_slopes)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] <= 0.1
    assert errors[1] < errors[0] / 2


def test_a_layer_takes_it_with_caches_sinks_and_gates():
    torch.manual_seed(0)
    prior = goat_prior(H, num_frequencies=2) + ForgettingPrior(24, H, half_lives=(1.0, 60.0))
    options = {"num_kv_heads": HK, "prior": prior, "sinks": AttentionSinks.logit(H)}
    layer, plain = (PriorAttention(24, H, backend=backend, **options).eval() for backend in ("rebased", "reference"))
    plain.load_state_dict(layer.state_dict())
    x = normal(B, L, 24, dtype=torch.float32)
    expected = plain(x, is_causal=True, need_weights=False)[0]
    assert_close(layer(x, is_causal=True, need_weights=False)[0], expected.detach(), tolerance=1e-5)
    cache = layer.make_cache(B, L)
    with torch.no_grad():
        parts = [
            layer(x[:, a:b], is_causal=True, need_weights=False, cache=cache)[0]
            for a, b in ((0, 40), (40, 41), (41, L))
        ]
    assert isinstance(cache, KeyValueCache)
    assert_close(torch.cat(parts, 1), expected.detach(), tolerance=1e-5)


def test_one_graph_trains():
    torch._dynamo.reset()
    layer = PriorAttention(24, H, prior=RecencyPrior(H) + ForgettingPrior(24, H), backend="rebased")
    x = normal(B, 33, 24, dtype=torch.float32)

    def run(model):
        output = model(x, is_causal=True, need_weights=False)[0]
        return output, torch.autograd.grad(output.square().sum(), list(layer.parameters()))

    found, grads = run(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    expected, exact = run(layer)
    assert_close(found, expected.detach(), tolerance=1e-5)
    for actual, right in zip(grads, exact, strict=True):
        assert_close(actual, right, tolerance=1e-4)


REFUSED = {
    "mask of pairs": ({"attn_mask": torch.ones(L, L, dtype=torch.bool)}, "it takes no mask of pairs"),
    "documents": ({"documents": PackedDocuments([L, L])}, "no documents"),
    "window": ({"window": 4, "is_causal": True}, "it has no window"),
    "dropout": ({"dropout_p": 0.5}, "it has no dropout"),
    "weights": ({"return_weights": True}, "do not return weights"),
    "no lanes": ({"prior": RelativeBiasPrior(H, 4)}, "priors with lanes"),
    "dense": ({"prior": DensePrior(torch.zeros(H, L, L))}, "priors with lanes"),
    "places": ({"prior": RecencyPrior(H), "query_positions": torch.arange(L)}, "positions must be consecutive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses(name):
    options, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=f"backend 'rebased' cannot serve this call .*{message}"):
        prior_attention(*content(), backend="rebased", **options)
