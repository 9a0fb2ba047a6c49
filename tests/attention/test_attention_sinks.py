"""Sinks against one dense float64 oracle: keys beside the others that no prior, mask or position reaches."""

import copy
import math

import pytest
import torch
from oracles import attention, causal, normal
from test_merging import AT, PATTERNS, PRIORS, B, D, H, L, V, content, dense, uncompiled  # noqa: F401
from tolerances import TOLERANCE, assert_close
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from eotattn.attention import AttentionSinks, KeyValueCache, PriorAttention, explain, merge, prior_attention
from eotattn.kernels import log_sum_exp
from eotattn.priors import RecencyPrior


def filled(sinks, seed=5):
    with torch.no_grad():
        for n, parameter in enumerate(sinks.parameters()):
            parameter.copy_(0.7 * normal(*parameter.shape, seed=seed + n))
    return sinks


def of_all_kinds(heads=2):
    return filled(
        AttentionSinks(
            logits=torch.zeros(H), has_zero_key=True, key=torch.zeros(heads, 3, D), value=torch.zeros(heads, 3, V)
        ).double()
    )


SINKS = {
    "logits": filled(AttentionSinks.logit(H).double()),
    "zero": AttentionSinks.zero_key(),
    "register": filled(AttentionSinks.registers(H, D, value_dim=V).double()),
    "registers": filled(AttentionSinks.registers(2, D, 3, value_dim=V).double()),
    "all": of_all_kinds(),
}


def parts_of(sinks, query, scale):
    """Logits (B, H, Q, N) and values (H, N, V) of the sinks, one at a time."""
    logits, values = [], []
    if sinks.logits is not None:
        logits.append(sinks.logits.double()[None, :, None].expand(query.shape[:3]))
        values.append(torch.zeros(H, V, dtype=torch.float64))
    if sinks.has_zero_key:
        logits.append(torch.zeros(query.shape[:3], dtype=torch.float64))
        values.append(torch.zeros(H, V, dtype=torch.float64))
    for n in range(0 if sinks.key is None else sinks.key.shape[1]):
        group = H // sinks.key.shape[0]
        key, value = (side.double()[:, n].repeat_interleave(group, 0) for side in (sinks.key, sinks.value))
        logits.append(scale * torch.einsum("bhqd,hd->bhq", query.double(), key))
        values.append(value)
    return torch.stack(logits, -1), torch.stack(values, 1)


def definition(query, key, value, sinks, log_prior, allowed, scale=D**-0.5):
    """Output, weights of the keys, and log-sum-exp of keys and sinks, all in one softmax."""
    group = H // key.shape[1]
    key, value = (side.double().repeat_interleave(group, 1) for side in (key, value))
    score = scale * torch.einsum("bhqd,bhkd->bhqk", query.double(), key)
    score = score if log_prior is None else score + log_prior.double()
    score = torch.where(allowed, score, -math.inf)
    logits, values = parts_of(sinks, query, scale)
    every = torch.cat([score, logits], -1)
    weights = every.softmax(-1)
    keys = weights[..., : key.shape[2]]
    output = torch.einsum("bhqk,bhkv->bhqv", keys, value)
    return output + torch.einsum("bhqn,hnv->bhqv", weights[..., key.shape[2] :], values), keys, every.logsumexp(-1)


@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["logits", "zero", "all"])
def test_they_share_one_softmax_with_the_keys(kind, pattern, name, kv_heads):
    arguments, allowed = PATTERNS[pattern]
    query, key, value = content(kv_heads=kv_heads)
    options = {"prior": PRIORS[name], "sinks": SINKS[kind], **arguments}
    expected = definition(query, key, value, SINKS[kind], dense(PRIORS[name], pattern), allowed)
    output, lse = prior_attention(query, key, value, return_lse=True, **options)
    assert_close(output, expected[0])
    assert_close(lse, expected[2])
    output, weights = prior_attention(query, key, value, return_weights=True, **options)
    assert_close(output, expected[0])
    assert_close(weights, expected[1])


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["causal", "window", "padding", "documents"])
@pytest.mark.parametrize("kind", SINKS)
def test_in_the_dtypes_of_kernels(kind, pattern, dtype, backend):
    arguments, allowed = PATTERNS[pattern]
    query, key, value = content(dtype, kv_heads=2)
    options = {"prior": PRIORS["goat"], "sinks": SINKS[kind], "backend": backend, **arguments}
    expected = definition(query, key, value, SINKS[kind], dense(PRIORS["goat"], pattern), allowed)
    output = prior_attention(query, key, value, **options)
    assert output.dtype == dtype
    assert_close(output, expected[0])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", SINKS)
def test_beside_flex_attention(uncompiled, kind):  # noqa: F811
    arguments, allowed = PATTERNS["window"]
    query, key, value = content(torch.float32)
    expected = definition(query, key, value, SINKS[kind], dense(PRIORS["table"], "window"), allowed)
    with torch.no_grad():
        options = {"prior": PRIORS["table"], "sinks": SINKS[kind], "backend": "flex", **arguments}
        assert_close(prior_attention(query, key, value, **options), expected[0])


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("pattern", ["causal", "padding", "window", "pairs"])
@pytest.mark.parametrize("kind", SINKS)
def test_gradients(kind, pattern, backend):
    arguments, allowed = PATTERNS[pattern]
    sinks, prior = SINKS[kind], PRIORS["goat"]
    leaves = [*(x.requires_grad_() for x in content(kv_heads=2)), *sinks.parameters(), *prior.parameters()]
    found = prior_attention(*leaves[:3], prior=prior, sinks=sinks, backend=backend, **arguments)
    expected = definition(*leaves[:3], sinks, dense(prior, pattern), allowed)[0]
    above = normal(*found.shape, seed=9)
    for ours, theirs in zip(*(torch.autograd.grad((x * above).sum(), leaves) for x in (found, expected)), strict=True):
        assert_close(ours, theirs, tolerance=1e-11 if theirs.dtype == torch.float64 else 1e-5)


def test_logits_may_be_a_tensor_computed_from_anything():
    query, key, value = content()
    given = normal(H, seed=4).requires_grad_()
    module = AttentionSinks(logits=given)
    outputs = [prior_attention(query, key, value, sinks=sinks) for sinks in (given, module)]
    assert torch.equal(*outputs)
    grads = [
        torch.autograd.grad(o.square().sum(), leaf)[0] for o, leaf in zip(outputs, (given, module.logits), strict=True)
    ]
    assert torch.equal(*grads)
    none = torch.full((H,), -math.inf, dtype=torch.float64)  # a head without a sink
    assert_close(prior_attention(query, key, value, sinks=none), prior_attention(query, key, value))


@pytest.mark.parametrize("name", ["recency", "goat", "table"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_a_cache_does_not_hold_them(name, padded, window):
    prior, sinks = PRIORS[name], SINKS["all"]
    query, key, value = content(kv_heads=2)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1, :2] = padded
    cache = KeyValueCache(B, 2, L, D, V, prior=prior, dtype=torch.float64)
    parts = []
    with torch.no_grad():
        for start, stop in ((0, 6), (6, 7), (7, 8), (8, L)):
            new = [side[:, :, start:stop] for side in (query, key, value)]
            options = {"key_padding_mask": padding[:, start:stop] if padded and start == 0 else None, "window": window}
            parts.append(prior_attention(*new, prior=prior, sinks=sinks, cache=cache, is_causal=True, **options))
    assert cache.length == L
    first = 2 if padded else 0
    own = [side[1:, :, first:] for side in (query, key, value)]
    at = torch.arange(L - first)
    seen = causal(at, at) & (at[:, None] - at < (window or L))
    log_prior = prior.dense(at, at, dtype=torch.float64)
    assert_close(torch.cat(parts, 2)[1:, :, first:], definition(*own, sinks, log_prior, seen)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["logits", "zero", "register"])
def test_recency_takes_nothing_from_them_at_query_100_000(kind, dtype):
    """The mass at a far query is that at a near one, which a key before the first token would not have."""
    prior, sinks, keys = RecencyPrior(H), SINKS[kind], 4096
    query, key, value = (normal(B, H, n, D, seed=n, dtype=dtype) for n in (1, keys, keys))
    value = value[..., :V]
    allowed, masses = torch.ones(1, keys, dtype=torch.bool), []
    for last in (keys, 100_000):
        at = torch.arange(last - keys, last)
        places = {"query_positions": [last - 1], "key_positions": range(last - keys, last)}
        with torch.no_grad():
            output, lse = prior_attention(query, key, value, prior=prior, sinks=sinks, return_lse=True, **places)
            own = sinks().log_sum_exp(query, D**-0.5)
            log_prior = prior.dense(at[-1:], at, dtype=torch.float64)
            expected = definition(query, key, value, sinks, log_prior, allowed)
        masses.append((own - lse).exp().double())
        assert_close(output, expected[0], tolerance=1e-4 if dtype == torch.float32 else None)
        ratio = masses[-1] / (1 - expected[1].sum(-1))
        # sums of half a nat a token over half of the keys: 2^-24 of 1024 nats each, beside what 16-bit lanes may add
        assert_close(ratio, torch.ones_like(ratio), tolerance=1e-3 if dtype == torch.float32 else 8e-3)
    assert_close(masses[1] / masses[0], torch.ones_like(masses[0]), tolerance=2e-3)


def test_gradients_of_torch_func_take_a_route_that_has_them():
    query, key, value = content()
    sinks = SINKS["registers"]

    def total(sink, backend="auto"):
        bias = torch.arange(L) * sink
        options = {"prior": RecencyPrior(H), "key_bias": bias.expand(B, 1, L), "sinks": sinks, "is_causal": True}
        return prior_attention(query, key, value, **options, backend=backend).sum()

    sink = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(total(sink), sink)
    assert_close(torch.func.grad(total)(sink.detach()), expected)
    assert_close(torch.func.vmap(torch.func.grad(total))(sink.detach().expand(3)), expected.expand(3))
    for backend in ("sdpa", "near_far", "rebased"):
        with pytest.raises(NotImplementedError, match=f"backend '{backend}' cannot serve this call .* torch.func"):
            torch.func.grad(lambda x, backend=backend: total(x, backend))(sink.detach())


def test_shapes_are_known_without_numbers():
    """On the meta device and under a mode of fake tensors."""

    def shape(device):
        layer = PriorAttention(16, H, sinks=AttentionSinks.registers(H, 16 // H), prior=RecencyPrior(H), device=device)
        output = layer(torch.ones(B, L, 16, device=device), is_causal=True, need_weights=False)[0]
        output.sum().backward()
        return output.shape

    assert shape("meta") == (B, L, 16)
    with FakeTensorMode():
        assert shape(None) == (B, L, 16)


def test_explain_knows_whose_gradients_are_followed(monkeypatch):
    seen = []
    monkeypatch.setattr(log_sum_exp, "route", lambda *_, with_gradient: seen.append(with_gradient) or "cpu")
    for prior in (RecencyPrior(H), RecencyPrior(H).freeze(), None):
        explain(*content(), prior=prior, sinks=SINKS["logits"], is_causal=True)
    assert seen == [True, False, False]


def test_a_query_without_keys_has_what_its_sinks_give():
    query, key, value = content()
    padding = torch.ones(B, L, dtype=torch.bool)
    for backend in ("sdpa", "reference"):
        options = {"key_padding_mask": padding, "backend": backend, "return_lse": True}
        output, lse = prior_attention(query, key, value, sinks=SINKS["logits"], **options)
        assert output.abs().max() == 0
        assert_close(lse, SINKS["logits"].logits[None, :, None].expand(lse.shape))
        output, _ = prior_attention(query, key, value, sinks=SINKS["register"], **options)
        assert_close(output, SINKS["register"].value[None].expand(B, H, L, V))


def test_sinks_of_one_part_are_sinks_of_the_whole():
    query, key, value = content()
    sinks, prior = SINKS["all"], PRIORS["goat"]
    whole = prior_attention(query, key, value, prior=prior, sinks=sinks, return_lse=True)
    options = {"prior": prior, "query_positions": range(L), "return_lse": True}
    parts = [
        prior_attention(query, key[:, :, :6], value[:, :, :6], key_positions=range(6), sinks=sinks, **options),
        prior_attention(query, key[:, :, 6:], value[:, :, 6:], key_positions=range(6, L), **options),
    ]
    for ours, theirs in zip(merge(*zip(*parts, strict=True)), whole, strict=True):
        assert_close(ours, theirs)


def test_dropout_reaches_registers():
    sinks, (query, key, value) = SINKS["register"], content()
    value = torch.zeros_like(value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = prior_attention(query, key, value, sinks=sinks, dropout_p=0.5)
    kept = output.abs().amax(-1) > 0
    assert 0.3 < kept.double().mean() < 0.7
    assert_close(output[kept], 2 * prior_attention(query, key, value, sinks=sinks)[kept])


def test_one_graph_serves_all_lengths():
    torch._dynamo.reset()
    counter, sinks = CompileCounter(), SINKS["all"]

    def attend(query, key, value):
        return prior_attention(query, key, value, prior=PRIORS["goat"], sinks=sinks, is_causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for length in (5, 9, 12, 16):
        own = content(torch.float32, length=length)
        assert_close(compiled(*own), attend(*own))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("name", ["none", "goat", "table"])
def test_graphs_of_cached_steps(name, window):
    torch._dynamo.reset()
    prior, counter, (query, key, value) = PRIORS[name], CompileCounter(), content()
    arguments = {"prior": prior, "sinks": SINKS["all"], "is_causal": True, "window": window}
    cache = KeyValueCache(B, H, L, D, V, prior=prior, dtype=torch.float64)
    step = torch.compile(lambda *new: prior_attention(*new, cache=cache, **arguments), fullgraph=True, backend=counter)
    with torch.no_grad():
        expected = prior_attention(query, key, value, **arguments)
        prior_attention(*(x[:, :, :4] for x in (query, key, value)), cache=cache, **arguments)
        outputs = [step(*(x[:, :, t : t + 1] for x in (query, key, value))) for t in range(4, L)]
    assert_close(torch.cat(outputs, 2), expected[:, :, 4:])
    assert counter.frame_count <= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["causal", "window", "padding", "pairs", "documents"])
@pytest.mark.parametrize("kind", ["logits", "all"])
def test_on_the_gpu(kind, pattern, dtype):
    """Forward by every backend that serves, and all gradients by that of ``"auto"``."""
    arguments, allowed = PATTERNS[pattern]
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    host = [x.requires_grad_() for x in content(dtype, kv_heads=2)]
    sides = [x.detach().cuda().requires_grad_() for x in host]
    prior, sinks = copy.deepcopy(PRIORS["goat"]).cuda(), copy.deepcopy(SINKS[kind]).cuda()
    expected = definition(*host, SINKS[kind], dense(PRIORS["goat"], pattern), allowed)[0]
    for backend in ("sdpa", "flex", "reference"):
        with torch.no_grad():
            if explain(*sides, prior=prior, sinks=sinks, backend=backend, **moved).backend is not None:
                output = prior_attention(*sides, prior=prior, sinks=sinks, backend=backend, **moved)
                assert_close(output.cpu(), expected)
    leaves, exact = [*sides, *sinks.parameters()], [*host, *SINKS[kind].parameters()]
    found = torch.autograd.grad(prior_attention(*sides, prior=prior, sinks=sinks, **moved).sum(), leaves)
    for ours, theirs in zip(found, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert_close(ours.cpu(), theirs, tolerance=None if dtype == torch.float64 else 5 * TOLERANCE[dtype])


def test_explain_says_that_they_are_joined():
    query, key, value = content(torch.float32)
    said = str(explain(query, key, value, sinks=SINKS["logits"]))
    assert "sinks are joined by the log-sum-exp" in said
    assert "sinks" not in str(explain(query, key, value))


def test_they_are_initialised_and_reset():
    assert AttentionSinks.logit(3).logits.tolist() == [0.0] * 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sinks = AttentionSinks.registers(8, 64, 4, value_dim=32, dtype=torch.float64)
    assert (sinks.key.shape, sinks.value.shape) == ((8, 4, 64), (8, 4, 32))
    assert math.isclose(float(sinks.key.detach().std()), 512**-0.5, rel_tol=0.15)
    before = sinks.key.detach().clone()
    sinks.reset_parameters()
    assert not torch.equal(sinks.key, before)
    assert {name: p.shape for name, p in of_all_kinds().named_parameters()} == {
        "logits": (H,),
        "key": (2, 3, D),
        "value": (2, 3, V),
    }


X = torch.zeros(B, H, L, D)
REGISTERS = AttentionSinks.registers


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: prior_attention(X, X, X, sinks=torch.zeros(H + 1)),
            ValueError,
            "prior_attention: sinks must have shape",
        ),
        (
            lambda: prior_attention(X, X, X, sinks=torch.zeros(H, 1)),
            ValueError,
            "prior_attention: sinks must have shape",
        ),
        (
            lambda: prior_attention(X, X, X, sinks=0.5),
            TypeError,
            "prior_attention: sinks must be a tensor of one logit",
        ),
        (lambda: prior_attention(X, X, X, sinks=torch.zeros(H).long()), TypeError, "prior_attention: sinks"),
        (lambda: prior_attention(X, X, X, sinks=torch.full((H,), math.nan)), ValueError, "hold no NaN"),
        (lambda: prior_attention(X, X, X, sinks=torch.full((H,), math.inf)), ValueError, "hold no NaN and no +inf"),
        (
            lambda: prior_attention(X, X, X, sinks=torch.zeros(H, device="meta")),
            ValueError,
            "prior_attention: sinks must",
        ),
        (lambda: prior_attention(X, X, X, sinks=AttentionSinks.logit(H + 1)), ValueError, "sinks must have shape"),
        (
            lambda: prior_attention(X, X, X, sinks=REGISTERS(3, D)),
            ValueError,
            "a number of heads that divides the query's",
        ),
        (lambda: prior_attention(X, X, X, sinks=REGISTERS(H, D + 1)), ValueError, "sinks (keys) must have shape"),
        (
            lambda: prior_attention(X, X, X, sinks=REGISTERS(H, D, value_dim=3)),
            ValueError,
            "sinks (values) must have shape",
        ),
        (lambda: AttentionSinks(), ValueError, "AttentionSinks: sinks must be at least one"),
        (lambda: AttentionSinks(logits=torch.zeros(2, 2)), ValueError, "AttentionSinks: logits must have 1 axes"),
        (lambda: AttentionSinks(logits=[0.0]), TypeError, "AttentionSinks: logits"),
        (lambda: AttentionSinks(key=torch.zeros(0, 1, 4)), ValueError, "AttentionSinks: key must have 3 axes"),
        (lambda: AttentionSinks(value=torch.zeros(1, 1, 4)), ValueError, "AttentionSinks: value must come with key"),
        (lambda: AttentionSinks.logit(0), ValueError, "AttentionSinks.logit: num_heads must be at least 1"),
        (lambda: REGISTERS(2, 4, 0), ValueError, "AttentionSinks.registers: count must be at least 1"),
    ],
)
def test_bad_sinks(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_attention_to_appended_keys_is_what_registers_are():
    """With keys at no position at all: a plain call over registers and keys."""
    query, key, value = content()
    sinks = SINKS["register"]
    appended = [
        torch.cat([side[None].expand(B, -1, -1, -1), x], 2) for side, x in ((sinks.key, key), (sinks.value, value))
    ]
    assert_close(prior_attention(query, key, value, sinks=sinks), attention(query, *appended)[0])
