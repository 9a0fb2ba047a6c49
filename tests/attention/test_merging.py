"""Log-sum-exps of attention calls against a dense float64 oracle, and calls over disjoint keys joined by them."""

import math

import pytest
import torch
from oracles import causal, normal
from tolerances import TOLERANCE, assert_close
from torch.nn.attention.flex_attention import flex_attention

from eotattn.attention import KeyValueCache, PackedDocuments, merge, prior_attention
from eotattn.kernels import flex, log_sum_exp
from eotattn.priors import RecencyPrior, RelativeBiasPrior, SinkPrior, goat_prior

B, H, L, D, V = 2, 4, 13, 8, 6
AT = torch.arange(L)
LENGTHS = [5, 8, 13]
DOCUMENT = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS)).view(B, L)
PADDING = torch.zeros(B, L, dtype=torch.bool)
PADDING[0, :3], PADDING[1, 9:] = True, True
PAIRS = torch.rand(B, 1, L, L, generator=torch.Generator().manual_seed(9)) > 0.4
PAIRS[1, 0, 4] = False
BIAS = torch.where(PAIRS, normal(B, 1, L, L, seed=8).float(), -math.inf)
WINDOW = causal(AT, AT) & (AT[:, None] - AT < 4)
#: Name -> (arguments, the pairs that are admissible).
PATTERNS = {
    "whole": ({}, torch.ones(L, L, dtype=torch.bool)),
    "causal": ({"is_causal": True}, causal(AT, AT)),
    "window": ({"is_causal": True, "window": 4}, WINDOW),
    "padding": ({"key_padding_mask": PADDING, "is_causal": True}, causal(AT, AT) & ~PADDING[:, None, None]),
    "padding in a window": (
        {"key_padding_mask": PADDING, "is_causal": True, "window": 4},
        WINDOW & ~PADDING[:, None, None],
    ),
    "pairs": ({"attn_mask": PAIRS}, PAIRS),
    "added to pairs": ({"attn_mask": BIAS}, PAIRS),
    "documents": ({"documents": PackedDocuments(LENGTHS)}, (DOCUMENT[:, :, None] == DOCUMENT[:, None])[:, None]),
    "documents, window": (
        {"documents": PackedDocuments(LENGTHS), "is_causal": True, "window": 4},
        (DOCUMENT[:, :, None] == DOCUMENT[:, None])[:, None] & WINDOW,
    ),
}


def trained(prior, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return prior


PRIORS = {
    "none": None,
    "recency": trained(RecencyPrior(H)),
    "goat": trained(goat_prior(H, num_frequencies=2, length_scale=16.0)),
    "sum": RecencyPrior(H) + trained(SinkPrior(H)) * 0.5,
    "table": trained(RelativeBiasPrior(H, 3)),
}


def content(dtype=torch.float64, kv_heads=H, length=L, seed=0):
    shapes = (B, H, length, D), (B, kv_heads, length, D), (B, kv_heads, length, V)
    return [normal(*shape, seed=seed + n, dtype=dtype) for n, shape in enumerate(shapes)]


def definition(query, key, value, log_prior, allowed, scale=D**-0.5):
    """Output and log-sum-exp of the dense float64 form, by exponentials; rows without keys are zero and -inf."""
    query, key, value = query.double(), key.double(), value.double()
    key, value = (side.repeat_interleave(query.shape[1] // key.shape[1], 1) for side in (key, value))
    score = scale * torch.einsum("bhqd,bhkd->bhqk", query, key)
    score = score if log_prior is None else score + log_prior.double()
    allowed = allowed.expand(score.shape)
    peak = torch.where(allowed, score, -1e300).amax(-1, keepdim=True).detach()
    mass = torch.where(allowed, torch.exp(torch.where(allowed, score - peak, 0.0)), 0.0)
    total = mass.sum(-1, keepdim=True)
    has = allowed.any(-1)
    lse = torch.where(has, torch.where(has, total.squeeze(-1), 1.0).log() + peak.squeeze(-1), -math.inf)
    return torch.einsum("bhqk,bhkv->bhqv", mass / torch.where(total == 0, 1.0, total), value), lse


def dense(prior, pattern):
    at = AT if "documents" not in PATTERNS[pattern][0] else PATTERNS[pattern][0]["documents"].positions(B, L, AT.device)
    log_prior = None if prior is None else prior.dense(at, at, dtype=torch.float64)
    if pattern == "added to pairs":
        bias = torch.where(PAIRS, BIAS, 0.0)
        return bias if log_prior is None else log_prior + bias
    return log_prior


def same_rows(found, expected, tolerance):
    assert torch.equal(found.isneginf(), expected.isneginf())
    assert_close(
        found.masked_fill(found.isneginf(), 0), expected.masked_fill(expected.isneginf(), 0), tolerance=tolerance
    )


@pytest.fixture
def uncompiled(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    monkeypatch.setattr(flex, "refusal", lambda query, **_: None)


@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_output_and_log_sum_exp_are_those_of_the_definition(pattern, name, backend, kv_heads):
    arguments, allowed = PATTERNS[pattern]
    query, key, value = content(kv_heads=kv_heads)
    options = {"prior": PRIORS[name], "backend": backend, **arguments}
    output, lse = prior_attention(query, key, value, return_lse=True, **options)
    expected_output, expected = definition(query, key, value, dense(PRIORS[name], pattern), allowed)
    assert lse.dtype == torch.float64
    assert_close(output, expected_output)
    same_rows(lse, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["none", "recency", "goat", "sum"])
@pytest.mark.parametrize("pattern", ["whole", "causal", "window", "padding", "pairs", "documents"])
def test_in_the_dtypes_of_kernels(pattern, name, dtype):
    """Of the content as rounded; what lanes add in 16 bits stays within the tolerance that they were made for."""
    arguments, allowed = PATTERNS[pattern]
    query, key, value = content(dtype)
    output, lse = prior_attention(query, key, value, prior=PRIORS[name], return_lse=True, backend="sdpa", **arguments)
    expected_output, expected = definition(query, key, value, dense(PRIORS[name], pattern), allowed)
    assert lse.dtype == torch.float32
    assert_close(output, expected_output)
    same_rows(lse, expected, TOLERANCE[torch.float32] if dtype == torch.float32 else 2e-3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pattern", ["whole", "causal", "window", "padding", "pairs", "documents"])
def test_flex_attention_returns_it_too(uncompiled, pattern):
    arguments, allowed = PATTERNS[pattern]
    query, key, value = content(torch.float32, kv_heads=2)
    options = {"prior": PRIORS["goat"], "backend": "flex", **arguments}
    with torch.no_grad():
        output, lse = prior_attention(query, key, value, return_lse=True, **options)
    expected_output, expected = definition(query, key, value, dense(PRIORS["goat"], pattern), allowed)
    assert_close(output, expected_output)
    same_rows(lse, expected, 1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", ["none", "recency", "goat", "sum"])
@pytest.mark.parametrize("pattern", ["whole", "window", "padding", "pairs", "documents"])
def test_gradients_of_both(pattern, name, backend):
    arguments, allowed = PATTERNS[pattern]
    prior = PRIORS[name]
    leaves = [*(x.requires_grad_() for x in content(kv_heads=2)), *([] if prior is None else prior.parameters())]
    output, lse = prior_attention(*leaves[:3], prior=prior, return_lse=True, backend=backend, **arguments)
    expected = definition(*leaves[:3], dense(prior, pattern), allowed)
    above = [normal(*x.shape, seed=20 + n) for n, x in enumerate(expected)]
    has_keys = ~expected[1].isneginf()
    losses = [
        (o * above[0]).sum() + (l.masked_select(has_keys) * above[1].masked_select(has_keys)).sum()
        for o, l in ((output, lse), expected)
    ]
    for ours, theirs in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert_close(ours, theirs, tolerance=1e-11 if theirs.dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("first", [0, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_far_out(first, dtype):
    """Lanes leave out what a row shares: the log-sum-exp has it all the same, to what float32 sums leave."""
    prior = RecencyPrior(H)
    query, key, value = content(dtype)
    at = range(first, first + L)
    places = {"query_positions": at, "key_positions": at, "is_causal": True}
    _, lse = prior_attention(query, key, value, prior=prior, return_lse=True, **places)
    _, expected = definition(query, key, value, prior.dense(AT, AT, dtype=torch.float64), causal(AT, AT))
    assert_close(lse, expected, tolerance=1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("name", ["none", "recency", "goat", "table"])
@pytest.mark.parametrize("kv_heads", [H, 2])
def test_steps_of_a_cache(name, kv_heads):
    prior = PRIORS[name]
    query, key, value = content(kv_heads=kv_heads)
    cache = KeyValueCache(B, kv_heads, L + 3, D, V, prior=prior, dtype=torch.float64)
    _, expected = definition(query, key, value, dense(prior, "causal"), causal(AT, AT))
    with torch.no_grad():
        for start, stop in ((0, 6), (6, 7), (7, L)):
            new = [side[:, :, start:stop] for side in (query, key, value)]
            _, lse = prior_attention(*new, prior=prior, cache=cache, is_causal=True, return_lse=True)
            assert_close(lse, expected[:, :, start:stop])


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", ["none", "goat"])
def test_what_tokens_decide_counts(name, backend):
    """Biases of keys and queries and a query's own factors: a row's number too, with all gradients."""
    prior = PRIORS[name]
    query, key, value = (x.requires_grad_() for x in content())
    key_bias, query_bias = (normal(B, H, L, seed=n).requires_grad_() for n in (11, 12))
    gain = (0.5 + normal(B, H, L, seed=13).sigmoid()).requires_grad_()
    learned = [query, key, key_bias, query_bias, *([] if prior is None else [gain, *prior.parameters()])]
    options = {"query_gains": () if prior is None else gain, "is_causal": True}
    biases = {"key_bias": key_bias, "query_bias": query_bias}
    output, lse = prior_attention(query, key, value, prior=prior, return_lse=True, backend=backend, **options, **biases)
    log_prior = key_bias[:, :, None] + query_bias[..., None]
    if prior is not None:
        log_prior = log_prior + gain[..., None] * prior.dense(AT, AT, dtype=torch.float64)
    expected = definition(query, key, value, log_prior, causal(AT, AT))
    assert_close(output, expected[0])
    assert_close(lse, expected[1])
    above = [normal(*x.shape, seed=14 + n) for n, x in enumerate(expected)]
    for ours, theirs in zip(*(torch.autograd.grad(x, learned, above) for x in ((output, lse), expected)), strict=True):
        assert_close(ours, theirs, tolerance=1e-11 if theirs.dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_what_tokens_decide_counts_in_steps_of_a_cache(padded):
    prior, (query, key, value) = PRIORS["goat"], content()
    key_bias, query_bias, gain = (normal(B, H, L, seed=n).abs() for n in (11, 12, 13))
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1, :2] = padded
    cache = KeyValueCache(B, H, L, D, V, prior=prior, dtype=torch.float64)
    found = []
    with torch.no_grad():
        for start, stop in ((0, 6), (6, 7), (7, L)):
            new = [side[:, :, start:stop] for side in (query, key, value)]
            token = {"key_bias": key_bias, "query_bias": query_bias, "query_gains": gain}
            options = {name: x[..., start:stop] for name, x in token.items()}
            options["key_padding_mask"] = padding[:, start:stop] if padded and start == 0 else None
            found.append(prior_attention(*new, prior=prior, cache=cache, is_causal=True, return_lse=True, **options)[1])
        first = 2 if padded else 0
        at = torch.arange(L - first)
        log_prior = (key_bias[:, :, None] + query_bias[..., None])[1:, :, first:, first:]
        log_prior = log_prior + gain[1:, :, first:, None] * prior.dense(at, at, dtype=torch.float64)
        own = [side[1:, :, first:] for side in (query, key, value)]
        assert_close(torch.cat(found, 2)[1:, :, first:], definition(*own, log_prior, causal(at, at))[1])


def test_dropout_drops_weights_and_not_the_log_sum_exp():
    query, key, value = content()
    expected = prior_attention(query, key, value, prior=PRIORS["goat"], return_lse=True)
    for backend in ("sdpa", "reference"):
        options = {"prior": PRIORS["goat"], "backend": backend, "dropout_p": 0.5}
        output, lse = prior_attention(query, key, value, return_lse=True, **options)
        assert_close(lse, expected[1])
        assert (output - expected[0]).abs().max() > 0.1


def test_all_three_come_in_order():
    query, key, value = content()
    output, weights, lse = prior_attention(query, key, value, return_weights=True, return_lse=True)
    assert (output.shape, weights.shape, lse.shape) == ((B, H, L, V), (B, H, L, L), (B, H, L))


@pytest.mark.parametrize("name", ["none", "goat"])
def test_one_graph_serves_it(name):
    prior = PRIORS[name]
    query, key, value = content(torch.float32)
    torch._dynamo.reset()

    def both(query, key, value):
        return prior_attention(query, key, value, prior=prior, is_causal=True, return_lse=True, backend="sdpa")

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    leaves = [[x.clone().requires_grad_() for x in (query, key, value)] for _ in range(2)]
    results = [function(*own) for function, own in zip((both, compiled), leaves, strict=True)]
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)
    grads = [torch.autograd.grad(o.sum() + l.sin().sum(), own) for (o, l), own in zip(results, leaves, strict=True)]
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs)


# Joining ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_calls_over_disjoint_keys_are_one_call(dtype):
    query, key, value = content(dtype, kv_heads=2)
    prior, at = PRIORS["goat"], range(L)
    expected = definition(query, key, value, dense(prior, "causal"), causal(AT, AT))
    parts = []
    for keys in (range(5), range(5, 6), range(6, L)):
        own = (key[:, :, keys.start : keys.stop], value[:, :, keys.start : keys.stop])
        places = {"query_positions": at, "key_positions": keys, "is_causal": True}
        parts.append(prior_attention(query, *own, prior=prior, return_lse=True, **places))
    output, lse = merge(*zip(*parts, strict=True))
    assert output.dtype == dtype
    assert_close(output, expected[0])
    assert_close(lse, expected[1], tolerance=2e-3 if dtype.itemsize < 4 else None)
    first = merge(*zip(*parts[:2], strict=True))
    for ours, theirs in zip(merge(*zip(first, parts[2], strict=True)), (output, lse), strict=True):
        assert_close(ours, theirs)


def test_gradients_through_a_join():
    query, key, value = (x.requires_grad_() for x in content())
    parts = []
    for keys in (range(9), range(9, L)):  # the first queries have no key in the second part
        own = (key[:, :, keys.start : keys.stop], value[:, :, keys.start : keys.stop])
        places = {"query_positions": range(L), "key_positions": keys, "is_causal": True}
        parts.append(prior_attention(query, *own, prior=PRIORS["goat"], return_lse=True, **places))
    whole = definition(query, key, value, dense(PRIORS["goat"], "causal"), causal(AT, AT))
    above = [normal(*x.shape, seed=30 + n) for n, x in enumerate(whole)]
    grads = [torch.autograd.grad(x, (query, key, value), above) for x in (merge(*zip(*parts, strict=True)), whole)]
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs)


def test_queries_without_keys_anywhere():
    output = torch.full((1, 1, 2, 3), 5.0, dtype=torch.float64)
    output[0, 0, 1] = math.nan  # of no meaning where there is no key
    lse = torch.tensor([[[0.3, -math.inf]]], dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (output, output.detach().clone(), lse, lse.detach().clone())]
    found = merge(leaves[:2], leaves[2:])
    assert found[0][0, 0].tolist() == [[5.0] * 3, [0.0] * 3]
    assert math.isclose(float(found[1].detach()[0, 0, 0]), 0.3 + math.log(2))
    assert found[1][0, 0, 1] == -math.inf
    for grad in torch.autograd.grad(found[0].sum() + found[1].exp().sum(), leaves):
        assert grad.isfinite().all()
        assert (grad[..., 1] if grad.dim() == 3 else grad[:, :, 1]).abs().max() == 0


X, Y = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    ("outputs", "lses", "error", "words"),
    [
        (X, [Y], TypeError, "outputs must be a list"),
        ([], [], TypeError, "outputs must be a list"),
        ([X], [Y, Y], ValueError, "lses must be as many as the 1 outputs"),
        ([X, X[:, :1]], [Y, Y], ValueError, "outputs must have shape"),
        ([X, X], [Y, Y[:, :, :2]], ValueError, "lses must have shape"),
        ([X, X.double()], [Y, Y], ValueError, "outputs must have one dtype"),
        ([X.long()], [Y], TypeError, "outputs"),
        ([X[0]], [Y[0]], ValueError, "outputs must have shape"),
    ],
)
def test_bad_parts(outputs, lses, error, words):
    with pytest.raises(error, match=r"^merge: ") as caught:
        merge(outputs, lses)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_learned_mask_is_left_to_the_dense_form():
    query, key, value = content()
    mask = normal(L, L, seed=5).requires_grad_()
    with pytest.raises(NotImplementedError, match=r"'sdpa'.*no gradient in attn_mask"):
        prior_attention(query, key, value, attn_mask=mask, return_lse=True, backend="sdpa")
    _, lse = prior_attention(query, key, value, attn_mask=mask, return_lse=True)
    (found,) = torch.autograd.grad(lse.sum(), mask)
    assert_close(found.sum(), torch.tensor(float(B * H * L), dtype=torch.float64))


def test_masks_reach_every_operator(monkeypatch):
    """The operator of GPUs is made of the same operands; blocks stand in for it here."""
    monkeypatch.setattr(log_sum_exp, "route", lambda *_, **__: "blocks")
    monkeypatch.setitem(log_sum_exp._BLOCK_ELEMENTS, "cpu", 64)
    query, key, value = (x.requires_grad_() for x in content())
    for pattern in ("pairs", "added to pairs", "window"):
        arguments, allowed = PATTERNS[pattern]
        found = prior_attention(query, key, value, return_lse=True, backend="sdpa", **arguments)
        expected = definition(query, key, value, dense(None, pattern), allowed)
        grads = [torch.autograd.grad(o.sum() + l[~l.isneginf()].sum(), (query, key)) for o, l in (found, expected)]
        for ours, theirs in zip(*grads, strict=True):
            assert_close(ours, theirs)
